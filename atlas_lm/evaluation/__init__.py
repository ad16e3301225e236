"""What a trained model's memory is worth: losses by position and context, changed states, needles, chunk sizes."""
