"""The tests' networks are tiny: one thread is fastest, and never waits for a busy core."""

import torch

torch.set_num_threads(1)
