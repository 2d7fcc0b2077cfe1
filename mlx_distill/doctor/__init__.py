"""The step `doctor`: what this machine has, and the command that brings what it lacks."""
