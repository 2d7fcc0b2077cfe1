"""What teacher, base, distilled student and others answer, and what tests make of it."""
