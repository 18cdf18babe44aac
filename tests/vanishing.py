"""vanishing.py PORT: passes on what goes to a port of this machine, and prints the port where it listens. At each line of
input all that is connected vanishes, as a machine without power does: what comes for it is dropped unseen (a socket
filter, socket(7)), and nothing is sent."""

import ctypes
import socket
import struct
import sys
import threading

SO_ATTACH_FILTER, RETURN = 26, 0x06
code = ctypes.create_string_buffer(struct.pack("=HBBI", RETURN, 0, 0, 0))
drop = struct.pack("@HP", 1, ctypes.addressof(code))
connected, lock = set(), threading.Lock()


def pass_on(source, to):
    try:
        while data := source.recv(65536):
            with lock:
                if source not in connected:
                    break
                to.sendall(data)
        with lock:
            if source in connected:
                to.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def serve(listener):
    while True:
        near = listener.accept()[0]
        far = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.update((near, far))
        for pair in ((near, far), (far, near)):
            threading.Thread(target=pass_on, args=pair, daemon=True).start()


listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
threading.Thread(target=serve, args=(listener,), daemon=True).start()
gone = []
for _ in sys.stdin:
    with lock:
        for one in connected:
            one.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, drop)
        # The connections are not closed: that would be a message.
        gone += connected
        connected.clear()
    print("gone", flush=True)
