"""torchrun out of a process that has imported NeMo already: many ranks start for the price of one.

    python forked_torchrun.py serve SOCKET                      imports, says "ready", then forks whatever is asked for
    python forked_torchrun.py SOCKET [TORCHRUN'S ARGUMENTS]     torchrun itself, forked there, on this machine's network

The fork enters the caller's namespaces and takes over its environment and output, then runs torchrun's own main. With
``--run-path --start-method fork`` that forks the ranks in its turn.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import socket
import sys

NAMESPACES = ("net", "uts", "mnt")
_MOST = 1 << 20


def call(path: str, arguments: list[str]) -> int:
    """Asks for a torchrun and waits for its end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        handles = [1, 2, *(os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES)]
        request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()})
        socket.send_fds(connection, [request.encode()], handles)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(16)
    return int(answer) if answer else 1  # nothing: it was killed


def serve(path: str) -> None:
    for name in ("torch.distributed.run", "nemo_slam.training.pretrain"):
        importlib.import_module(name)

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _become(connection)
        connection.close()
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become(connection: socket.socket) -> None:
    """In the fork: the caller's machine, environment and output, then torchrun. Does not return."""
    data, handles, _, _ = socket.recv_fds(connection, _MOST, 2 + len(NAMESPACES))
    while more := connection.recv(_MOST):
        data += more
    request = json.loads(data)
    libc = ctypes.CDLL(None, use_errno=True)
    for handle in handles[2:]:
        if libc.setns(handle, 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        os.close(handle)
    os.dup2(handles[0], 1)
    os.dup2(handles[1], 2)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    from torch.distributed.run import main

    status = 1
    try:
        sys.argv = ["torchrun", *request["arguments"]]
        main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        connection.send(str(status).encode())
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(call(sys.argv[1], sys.argv[2:]))
