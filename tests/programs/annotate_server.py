"""Serves an annotation project from a child process, and again from a next one whenever that is killed.

Prints the address, and then the pid of each child. Ends when standard input does.
"""

import os
import signal
import sys
import threading

from diffdoctor.annotate.project import Project
from diffdoctor.annotate.server import build_app
from diffdoctor.web.serve import hosts_of, listening, make_server


def serve(folder, sock, port):
    make_server(build_app(Project(folder), hosts_of("127.0.0.1", port))).run(sockets=[sock])


def main(folder):
    # The parent keeps the socket: what clients ask while no child is there waits in its queue.
    with listening("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        print(f"http://127.0.0.1:{port}", flush=True)
        ended, child = [], 0

        def end():
            sys.stdin.read()
            ended.append(True)
            os.kill(child, signal.SIGKILL)

        while not ended:
            child = os.fork()
            if not child:
                serve(folder, sock, port)
                os._exit(0)
            print(child, flush=True)
            if not any(thread.name == "end" for thread in threading.enumerate()):
                threading.Thread(target=end, name="end", daemon=True).start()
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1])
