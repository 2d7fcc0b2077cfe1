"""Ask a teacher, keep every answer, make a data set."""
