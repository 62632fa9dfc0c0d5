"""A plan of your own: one layer freezes after each epoch, its rate falling to zero until then."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn

from freezeout import FreezeOut, Plan, Timeline


@dataclass(frozen=True)
class OneAnEpoch(Plan):
    epoch: int  # its steps

    def timeline(self, num_layers: int, total_steps: int | None, freeze_every: int = 1) -> Timeline:
        changes = [(k * self.epoch, k) for k in range(1, num_layers)]
        return Timeline.of(num_layers, total_steps, changes, freeze_every)

    def factors(self, step: int, timeline: Timeline) -> tuple[float, ...]:
        ends = timeline.freeze_steps  # of a layer that is never frozen: the run's end, or None
        return tuple(1 - min(step / end, 1) if end else 1.0 for end in ends)


digits = load_digits()
x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
torch.manual_seed(0)
blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)]
model, criterion = nn.Sequential(*blocks, nn.Linear(64, 10)), nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
with FreezeOut(model, optimizer, 90, schedule=OneAnEpoch(18), layers=list(model)) as freezer:
    for epoch in range(5):
        for ids in torch.split(torch.randperm(len(x)), 100):
            criterion(model(x[ids]), y[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
        print(f"epoch {epoch + 1}: {freezer.num_frozen} of {len(freezer.layers)} layers frozen")
    print(freezer.summary())
