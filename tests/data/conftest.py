import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked loader workers would print a warning
os.environ.setdefault("HF_HUB_OFFLINE", "1")
