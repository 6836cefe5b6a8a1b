"""Tries ways out of a build, as root of it, and prints the names of those that lead somewhere.

Nothing is harmed where they do: files are opened and not written, values are written back as they were.

escapes.py outside FILE   makes what is to be reached, and prints where it is, as JSON; ends with its input
escapes.py inside JSON    tries to reach it
"""

import contextlib
import ctypes
import json
import os
import socket
import stat
import subprocess
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
NAMES = ("init_module", "kexec_load", "add_key", "bpf", "name_to_handle_at", "open_by_handle_at")
NUMBERS = {"x86_64": (175, 246, 248, 321, 303, 304), "aarch64": (105, 104, 217, 280, 264, 265)}
CALLS = dict(zip(NAMES, NUMBERS[os.uname().machine]))
PLACE = "/tmp/escapes"
GIVEN = {}


def outside(file):
    """Things of the machine that no build may reach."""
    _, terminal = os.openpty()
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"\0ims-sshd-test-{os.getpid()}")
    server.listen()
    handle = ctypes.create_string_buffer((128).to_bytes(4, "little") + bytes(132))
    number = ctypes.c_int()
    call("name_to_handle_at", -100, file.encode(), handle, ctypes.byref(number), 0)
    # The table has its number as long as it is mounted: here in a mount namespace of this process.
    checked(LIBC.unshare(0x00020000))
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "binfmt_misc", "none", "/mnt"], check=True)
    place = {
        "other": file,
        "terminal": os.ttyname(terminal),
        "socket": f"ims-sshd-test-{os.getpid()}",
        "handle": handle.raw.hex(),
        "disk": os.stat(file).st_dev,
        "process": os.getpid(),
        "binfmt": os.stat("/mnt").st_dev,
    }
    print(json.dumps(place), flush=True)
    sys.stdin.read()


def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def call(name, *arguments):
    return checked(LIBC.syscall(CALLS[name], *arguments))


def mount(source, kind, options=None, flags=0):
    os.makedirs(PLACE, exist_ok=True)
    checked(LIBC.mount(source.encode(), PLACE.encode(), kind.encode(), flags, options and options.encode()))
    return PLACE


def unmount(path):
    checked(LIBC.umount2(path.encode(), 2))


def takes(name, *arguments):
    """Calls without sense: the error of a call that would be carried out is another one than that of a refused one."""
    try:
        call(name, *arguments)
    except OSError as e:
        if e.errno in (1, 38):
            raise


@contextlib.contextmanager
def disk():
    path = GIVEN["volume"] + "/disk"
    os.mknod(path, stat.S_IFBLK | 0o600, GIVEN["disk"])
    try:
        yield path
    finally:
        os.unlink(path)


def credentials():
    unmounted = GIVEN["credentials"]
    for _ in range(9):
        try:
            unmount(unmounted)
        except OSError:
            break
    open(unmounted + "/client-secret").close()


def rewritten(path):
    text = open(path).read()
    with open(path, "w") as file:
        file.write(text)


def same(path, other):
    found = os.stat(path)
    assert [found.st_dev, found.st_ino] == other, "another file"


def own_cgroups():
    LIBC.unshare(0x02000000)
    for kind, options in (("cgroup", "memory"), ("cgroup", "none,name=systemd"), ("cgroup2", None)):
        try:
            mount("none", kind, options)
        except OSError:
            continue
        return
    raise OSError("no hierarchy can be mounted")


def by_handle():
    handle = bytes.fromhex(GIVEN["handle"])
    buffer = ctypes.create_string_buffer(handle, len(handle))
    here = os.open(GIVEN["volume"], os.O_RDONLY)
    os.read(call("open_by_handle_at", here, buffer, os.O_RDONLY), 1)


def connect():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + GIVEN["socket"])


def block_device():
    with disk() as path:
        os.close(os.open(path, os.O_RDONLY))


def file_system():
    with disk() as path:
        mount(path, "ext4")


def binfmt():
    found = os.stat(mount("none", "binfmt_misc"))
    assert found.st_dev == GIVEN["binfmt"], "a table of its own"


WAYS = {
    "the credentials of the job": credentials,
    "a file of another job": lambda: open(GIVEN["other"]).close(),
    "a file of the machine, to write": lambda: open(GIVEN["other"], "a").close(),
    "the passwords of the machine": lambda: open("/etc/shadow").close(),
    "a file by its handle": by_handle,
    "a new file among the programs": lambda: os.unlink(open("/usr/.ims-sshd-test", "w").name),
    "the program of the build": lambda: same("/proc/1/exe", GIVEN["program"]),
    "the input of the build": lambda: os.chmod("/proc/1/fd/0", 0o666),
    "a device's mode": lambda: os.chmod("/dev/null", 0o666),
    "a terminal of the machine": lambda: os.close(os.open(GIVEN["terminal"], os.O_RDWR | os.O_NOCTTY)),
    "a process outside": lambda: os.kill(GIVEN["process"], 0),
    "a block device": block_device,
    "the file system of the machine": file_system,
    "all devices": lambda: mount("none", "devtmpfs"),
    "the kernel's log": lambda: open("/dev/kmsg").close(),
    "memory": lambda: open("/dev/mem").close(),
    "loop devices": lambda: open("/dev/loop-control").close(),
    "the kernel's memory": lambda: open("/proc/kcore", "rb").read(1),
    "sysrq": lambda: os.close(os.open("/proc/sysrq-trigger", os.O_WRONLY)),
    "the handler of core dumps": lambda: rewritten("/proc/sys/kernel/core_pattern"),
    "the loader of modules": lambda: rewritten("/proc/sys/kernel/modprobe"),
    "settings of the kernel": lambda: rewritten("/proc/sys/vm/swappiness"),
    "devices of the kernel": lambda: mount("none", "sysfs"),
    "control groups": own_cgroups,
    "interpreters": binfmt,
    "modules": lambda: takes("init_module", None, 0, None),
    "another kernel": lambda: takes("kexec_load", None, 0, None, 1 << 20),
    "a keyring": lambda: call("add_key", b"user", b"ims-sshd-test", b"x", 1, -3),
    "programs in the kernel": lambda: takes("bpf", 0, None, 0),
    "a socket outside": connect,
}


def inside():
    for name, way in WAYS.items():
        try:
            way()
        except (OSError, AssertionError) as e:
            print(f"{name}: {e}", file=sys.stderr)
        else:
            print(name)
        try:
            unmount(PLACE)
        except OSError:
            pass


if sys.argv[1] == "outside":
    outside(sys.argv[2])
else:
    GIVEN.update(json.loads(sys.argv[2]))
    inside()
