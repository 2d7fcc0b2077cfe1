"""The step `chat`: a conversation with base and distilled student. It knows no terminal: that is the command's."""
