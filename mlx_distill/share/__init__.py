"""Publishing a run on the Hugging Face Hub, and taking a published one back."""
