"""What a language model does while it generates: capture, metrics, health flags, report and sinks. A leaf."""
