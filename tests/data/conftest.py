import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # what lies in tests/

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked loader workers would print a warning
os.environ.setdefault("HF_HUB_OFFLINE", "1")
