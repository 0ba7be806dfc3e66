"""Keeps torch from starting threads for tiny tensors."""

import torch

torch.set_num_threads(1)
