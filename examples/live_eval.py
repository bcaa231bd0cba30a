"""Measure the test accuracy of a network while another process trains it, with that process's memory.

Run it beside train_and_publish.py, which says how. Nothing is copied: every tensor of a lease lies
in the trainer's own memory, and holds one version as long as the lease lasts.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

from etha.tensor_bus import bootstrap_client

torch.set_num_threads(1)
client, info = bootstrap_client()  # finds the agent by AGENT_RANK
device = info.device  # "cpu", or what this process calls the agent's GPU: "cuda:0"

pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
targets = torch.tensor(labels)
test = torch.arange(len(images)) % 5 == 0  # the digits that train_and_publish.py leaves out
images, targets = images[test].to(device), targets[test].to(device)

# A network without memory: it has no weights of its own, and computes with those it is given.
with torch.device("meta"):
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(1024, 270), nn.ReLU(), nn.Linear(270, 10),
    ).eval()  # fmt: skip

with client, torch.no_grad():
    print("waiting for a trainer", flush=True)
    policy = client.subscribe("digits", timeout=600.0)  # maps the trainer's memory, once
    for weights in policy:  # each newest version, under a lease that ends with the loop's step
        logits = functional_call(model, dict(weights), (images,))
        accuracy = (logits.argmax(1) == targets).double().mean().item()
        print(f"version {weights.version}: accuracy {accuracy:.3f}", flush=True)
    print("the trainer has closed its publication")
