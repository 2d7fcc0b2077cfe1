"""What `scripts/bench_train` is made of: one file a contender, and what measures them."""
