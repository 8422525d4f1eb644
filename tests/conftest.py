"""Tests run from any folder, without a network, on two threads."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"      # before transformers or diffusers are imported: nothing may be downloaded
# Before torch is: threads that wait leave the cores to the other process of `pytest -n 2`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

torch.set_num_threads(2)
