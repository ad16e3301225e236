"""What tests share: small runs, toys, cases, ranks, faults."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
