"""without_ipv6.py PROGRAM [ARGUMENT…]: runs a program for which there are no IPv6 sockets, as on a kernel with
`ipv6.disable=1`: socket(2) fails with EAFNOSUPPORT. A seccomp filter does it (seccomp(2))."""

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF: a word of seccomp_data, a jump, the end
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
AT_NUMBER, AT_ARCHITECTURE, AT_FIRST_ARGUMENT = 0, 4, 16
architecture, socket_number = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}[platform.machine()]
lines = [
    (LOAD, 0, 0, AT_ARCHITECTURE), (EQUAL, 0, 5, architecture),
    (LOAD, 0, 0, AT_NUMBER), (EQUAL, 0, 3, socket_number),
    (LOAD, 0, 0, AT_FIRST_ARGUMENT), (EQUAL, 0, 1, socket.AF_INET6),
    (RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT),
    (RETURN, 0, 0, ALLOW),
]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


prctl = ctypes.CDLL(None, use_errno=True).prctl
program = Program(len(lines), ctypes.addressof(code))
for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(program))):
    if prctl(*arguments):
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
os.execv(sys.argv[1], sys.argv[1:])
