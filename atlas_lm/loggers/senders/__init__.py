"""Named numbers on their way to Prometheus, Datadog and OpenTelemetry: of a generation, or of a training run."""
