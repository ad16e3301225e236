"""python -m atlas_lm.exit_gates"""

from atlas_lm.cli.arguments import call
from atlas_lm.exit_gates.command import main

if __name__ == "__main__":
    call(main)
