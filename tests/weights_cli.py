"""Run the command line with extra cards: ``python weights_cli.py FOLDER_OF_CARDS pull MODEL``; ``--no-sockets`` forbids the network."""

import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv.pop(1))
    if "--no-sockets" in sys.argv:
        sys.argv.remove("--no-sockets")
        forbid_sockets()
    from cellfm_hub import registry

    own = registry._card_folders
    registry._card_folders = lambda: [*own(), (folder, "tests")]  # type: ignore[assignment]
    from cellfm_hub.cli import main as run

    run()


def forbid_sockets() -> None:
    """Make every attempt to open a connection or to look up a name fail loudly."""
    import socket

    def refuse(*_: object, **__: object) -> None:
        message = "a socket was opened"
        raise AssertionError(message)

    socket.socket.connect = refuse  # type: ignore[method-assign, assignment]
    socket.socket.connect_ex = refuse  # type: ignore[method-assign, assignment]
    socket.socket.sendto = refuse  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = refuse  # type: ignore[assignment]
    socket.create_connection = refuse  # type: ignore[assignment]


if __name__ == "__main__":
    main()
