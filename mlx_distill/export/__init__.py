"""`export` and `import-adapter`: what was trained here in other tools' formats, and PEFT's adapters in ours."""
