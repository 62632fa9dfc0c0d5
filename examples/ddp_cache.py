"""Two processes fine-tune the last layers of a frozen network, each with a cache of its samples.

torchrun --nproc-per-node 2 examples/ddp_cache.py
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from freezeout import FreezeOut, Frozen, PrefixCache
from freezeout.cache import with_ids

dist.init_process_group("gloo")
digits = load_digits()
dataset = TensorDataset(torch.tensor(digits.data).float() / 16, torch.tensor(digits.target))
sampler: DistributedSampler[int] = DistributedSampler(dataset)
loader = with_ids(DataLoader(dataset, 50, sampler=sampler))  # (batch, ids) in place of batch

torch.manual_seed(0)
blocks = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()) for _ in range(4)]
model, criterion = nn.Sequential(*blocks, nn.Linear(64, 10)), nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
freezer = FreezeOut(model, optimizer, None, schedule=Frozen(3), layers=list(model))
cache = PrefixCache(freezer, num_samples=len(dataset), depths="all")
ddp = DistributedDataParallel(model)
for epoch in range(10):
    sampler.set_epoch(epoch)
    for (x, y), ids in loader:
        with cache.batch(ids):  # the call inside is served
            loss = criterion(ddp(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
print(f"rank {dist.get_rank()}: loss {loss:.4f}; {cache.summary()}\n", end="")
dist.destroy_process_group()
