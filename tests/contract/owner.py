"""The other process of the contract: it owns memory of one kind, and shares it with whoever asks on its socket.

owner.py WORLD SOCKET
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import msgspec  # noqa: E402
import torch  # noqa: E402
from worlds import WORLDS  # noqa: E402

PACKET = 253


def main() -> None:
    world = WORLDS[sys.argv[1]]()
    tensors: list[torch.Tensor] = []
    kept = []
    with socket.socket(fileno=int(sys.argv[2])) as sock:
        while line := sock.recv(1 << 16):
            told = json.loads(line)
            if told["do"] == "make":
                tensors = world.tensors(*told["sizes"])
                sock.send(b"made")
            elif told["do"] == "share":
                exported = world.export({name: tensors[index] for name, index in told["names"].items()})
                kept.append(exported)
                numbers = [fd.fileno() for fd in exported.fds]
                sock.send(msgspec.msgpack.encode((len(numbers), exported.manifest)))
                for first in range(0, len(numbers), PACKET):
                    socket.send_fds(sock, [b"fds"], numbers[first : first + PACKET])
            else:
                tensors[told["index"]].fill_(told["value"])
                if tensors[0].is_cuda:
                    torch.cuda.synchronize()
                sock.send(b"filled")


main()
