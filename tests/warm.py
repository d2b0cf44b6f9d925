"""An interpreter that need not import for seconds: launchers start their ranks with it.

``python`` on the PATH is then a small program that hands its command line, environment, folder and
output to a server, which has imported what training needs and done nothing else. The server forks;
the copy runs the script or module as the interpreter would. Launchers, scripts and processes are
the real ones.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from tests.builders import THREADS
from tests.processes import importing_from_the_checkout

_CLIENT = """\
#!{python} -SE
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps(dict(argv=sys.argv[1:], environ=dict(os.environ), cwd=os.getcwd())).encode()
server.sendmsg(
    [len(asked).to_bytes(8, 'big')],
    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1, 2]))],
)
server.sendall(asked)
answers = server.makefile('r')
process = int(answers.readline())
signal.signal(signal.SIGTERM, lambda *_: os.kill(process, signal.SIGTERM))
sys.exit(int(answers.readline() or 1))
"""


@contextmanager
def warm_python() -> Iterator[Path]:
    """Serves an interpreter.

    Yields:
        The program, which is called ``python``.
    """
    # An address has a hundred letters at most.
    with tempfile.TemporaryDirectory() as folder:
        yield from _served(Path(folder))


def _served(folder: Path) -> Iterator[Path]:
    address = str(folder / 'server')
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    program = folder / 'python'
    program.write_text(_CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o755)
    server = multiprocessing.get_context('forkserver').Process(target=_serve, args=(listening,))
    with importing_from_the_checkout():
        server.start()
    try:
        yield program
    finally:
        server.terminate()
        server.join()
        listening.close()


def _serve(listening: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies
    while True:
        client, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(client)
        client.close()


def _answer(client: socket.socket) -> NoReturn:
    head, outputs, *_ = socket.recv_fds(client, 8, 2)
    for number, output in zip((1, 2), outputs):
        os.dup2(output, number)
    asked = json.loads(client.makefile('rb').read(int.from_bytes(head, 'big')))
    client.sendall(f'{os.getpid()}\n'.encode())
    status = _status_of(asked)
    sys.stdout.flush()
    sys.stderr.flush()
    client.sendall(f'{status}\n'.encode())
    os._exit(status)


def _status_of(asked: dict[str, Any]) -> int:
    os.environ.clear()
    os.environ.update(asked['environ'])
    os.chdir(asked['cwd'])
    arguments = [argument for argument in asked['argv'] if argument != '-u']
    try:
        if arguments[0] == '-m':
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            _join_the_group()
            runpy.run_path(arguments[0], run_name='__main__')
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _join_the_group() -> None:
    torch.set_num_threads(THREADS)
    if 'RANK' in os.environ and 'LOCAL_RANK' in os.environ:
        # mmengine's own start of a process group asks for a GPU.
        torch.distributed.init_process_group('gloo')
