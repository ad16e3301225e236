"""python -m atlas_lm.exit_gates"""

from atlas_lm.exit_gates.command import main
from atlas_lm.options import call

if __name__ == "__main__":
    call(main)
