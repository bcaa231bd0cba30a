"""Train a small network on handwritten digits, and publish its weights at every step.

Three terminals, in any order (pip install scikit-learn first); nothing here changes with the device:

    etha agent --rank 0                  # or: etha agent --rank 0 --device cuda:0
    AGENT_RANK=0 python examples/train_and_publish.py [STEPS]
    AGENT_RANK=0 python examples/live_eval.py
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from etha.tensor_bus import bootstrap_client

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1000

torch.manual_seed(0)
torch.set_num_threads(1)
client, info = bootstrap_client()  # finds the agent by AGENT_RANK
device = info.device  # "cpu", or what this process calls the agent's GPU: "cuda:0"

pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
targets = torch.tensor(labels)
train = torch.arange(len(images)) % 5 != 0  # every fifth digit is left to live_eval.py
images, targets = images[train].to(device), targets[train].to(device)

model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(1024, 270), nn.ReLU(), nn.Linear(270, 10),
)  # fmt: skip

# Of the host's memory others can map what is shared only; a GPU's is, so there this does nothing.
model.to(device).share_memory()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

with client:
    policy = client.register_tensors("digits", dict(model.named_parameters()))
    print(f"registered version 0 with the agent of rank {info.agent_rank}", flush=True)
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(images), (64,), device=device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), targets[batch])
        loss.backward()  # reads the weights: readers may read them too
        with policy.update():  # no reader holds a lease in here
            optimizer.step()  # the only line that writes them
        if step % 50 == 0:
            print(f"version {policy.version}: loss {loss.item():.3f}", flush=True)
    policy.close()  # waits until the readers are done; their loops end
