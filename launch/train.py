"""The main job. Start it with the deepspeed launcher, or with python alone as one process.

deepspeed launch/train.py --ds_config zero2.json
deepspeed --module cai_scale.launch.train --ds_config zero2.json   # from an installed wheel
python launch/train.py
"""

import sys

from cai_scale.cli import train

if __name__ == "__main__":
    sys.exit(train())
