"""A phone for the real adb client: the device side of adb's wire protocol on a loopback port, backed by a folder.

Spoken: CNXN, AUTH, OPEN, OKAY, WRTE, CLSE; `shell:` and `shell,v2:` with exit codes; `sync:` with STAT, SEND, RECV, QUIT. Commands run in
this machine's shell, with the paths of a phone replaced by paths in the folder, and a few programs of Android in front of the PATH.
What goes wrong is told by the attributes of `Phone`.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

VERSION, MAX_DATA = 0x01000001, 256 * 1024
TOKEN, SIGNATURE, PUBLIC_KEY = 1, 2, 3
STDOUT, STDERR, EXIT = 1, 2, 3
ROOTS = ("/data/local/tmp", "/sys/")

PROGRAMS = {
    "taskset": 'echo "$1" > "$FAKE_ROOT/cpus"; shift; exec "$@"',
    "getprop": 'cat "$FAKE_ROOT/properties"',
    "dumpsys": 'cat "$FAKE_ROOT/dumpsys.$1"',
    "logcat": 'if [ "$1" = -c ]; then : > "$FAKE_ROOT/log"; else cat "$FAKE_ROOT/log"; fi',
    "pm": '[ "$1" != uninstall ] || rm -f "$FAKE_ROOT/app"; [ "$1" != install ] || touch "$FAKE_ROOT/app"; echo Success',
    # am start -S -n ACTIVITY --es args '"--graph=..."', am force-stop PACKAGE
    "am": '[ "$1" = start ] || exit 0; [ -f "$FAKE_ROOT/app" ] || { echo "Error type 3"; exit 0; }; echo "Starting: Intent"\n'
    'eval "set -- $7"; ( sh -c "\\"$FAKE_APP\\" $1" 2>&1 | sed "s/^/07-19 14:10:10.858  7937  7937 I tflite  : /" ) >> "$FAKE_ROOT/log" &',
}


class DisconnectedError(Exception):
    """The host went away, or the phone was unplugged."""


class Phone:
    """One phone.

    Attributes:
      authorized: False: never accepts the host's key.
      push_limit: bytes of pushed files until the phone is unplugged; None: never.
      runs_left: runs of the benchmark tool until the phone is unplugged in the middle of one; None: never.
      delay_s: of every command.
      full: there is no space left.
      corrupt: pushed files lose their last byte.
      environment: for what runs on the phone, such as the ways to fail of fake_benchmark_model.py.
      benchmarked: the graphs that the tool was run on, in order.
      process: the latest command.
      received: names of the files pushed, in order.
    """

    def __init__(self, root: Path, model: str, shell_v2: bool = True, clocks: tuple[int, ...] = (1800, 1800, 2400, 2800), number: str = ""):
        self.root, self.shell_v2, self.model = root, shell_v2, model
        self.authorized, self.push_limit, self.runs_left, self.full, self.corrupt, self.delay_s = True, None, None, False, False, 0.0
        self.environment: dict[str, str] = {}
        self.benchmarked: list[str] = []
        self.received: list[str] = []
        self.process: subprocess.Popen | None = None
        for folder in ("data/local/tmp", "sys/class/thermal/thermal_zone0", "bin"):
            (root / folder).mkdir(parents=True)
        for cpu, mhz in enumerate(clocks):
            folder = root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
            folder.mkdir(parents=True)
            (folder / "cpuinfo_max_freq").write_text(f"{mhz * 1000}\n")
        programs = PROGRAMS if shell_v2 else PROGRAMS | {"sha256sum": "echo sha256sum: not found; exit 127"}
        for name, script in programs.items():
            (root / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (root / "bin" / name).chmod(0o755)
        (root / "log").touch()
        properties = {
            "ro.product.model": model,
            "ro.serialno": number or model.replace(" ", "").upper(),
            "ro.soc.manufacturer": "Google",
            "ro.soc.model": "Tensor",
            "ro.build.version.release": "14" if shell_v2 else "6.0",
            "ro.build.version.sdk": "34" if shell_v2 else "23",
            "ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a",
        }
        (root / "properties").write_text("".join(f"[{name}]: [{value}]\n" for name, value in properties.items()))
        self.set_heat(28.5, 0, 41.0)
        self.connections: set[socket.socket] = set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def set_heat(self, battery_c: float, status: int, cpu_c: float) -> None:
        """What the phone's thermometers will show."""
        battery = f"Current Battery Service state:\n  level: 85\n  scale: 100\n  voltage: 4123\n  temperature: {battery_c * 10:.0f}\n"
        (self.root / "dumpsys.battery").write_text(battery)
        lines = [
            f"IsStatusOverride: false\nThermal Status: {status}\nCached temperatures:",
            "\tTemperature{mValue=33.6, mType=3, mName=VIRTUAL-SKIN, mStatus=0}",
            "\tTemperature{mValue=100.0, mType=8, mName=soc, mStatus=0}",
        ]
        (self.root / "dumpsys.thermalservice").write_text("\n".join(lines) + "\n")
        zone = self.root / "sys/class/thermal/thermal_zone0"
        (zone / "type").write_text("cpu thermal\n")
        (zone / "temp").write_text(f"{cpu_c * 1000:.0f}\n")

    def files(self) -> list[str]:
        """Names of what lies on the phone."""
        return sorted(path.name for path in (self.root / "data/local/tmp").rglob("*"))

    def unplug(self) -> None:
        """Breaks every connection."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        """Ends the phone."""
        self.listener.close()
        self.unplug()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections.add(connection)
            threading.Thread(target=Transport(self, connection).run, daemon=True).start()

    def to_host(self, path: str) -> str:
        """A path or command on the phone, as it is on this machine."""
        for prefix in ROOTS:
            path = path.replace(prefix, f"{self.root}{prefix}")
        return path


class Transport:
    """One connection."""

    def __init__(self, phone: Phone, connection: socket.socket):
        self.phone, self.connection = phone, connection
        self.lock = threading.Lock()
        self.streams: dict[int, Stream] = {}

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        number = int.from_bytes(command, "little")
        header = struct.pack("<6I", number, first, second, len(data), 0, number ^ 0xFFFFFFFF)
        try:
            with self.lock:
                self.connection.sendall(header + data)
        except OSError as error:
            raise DisconnectedError from error

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = self.connection.recv(size)
            except OSError as error:
                raise DisconnectedError from error
            if not part:
                raise DisconnectedError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def run(self) -> None:
        try:
            while True:
                number, first, second, length, _, _ = struct.unpack("<6I", self.read(24))
                self.handle(number.to_bytes(4, "little"), first, second, self.read(length))
        except DisconnectedError:
            self.phone.connections.discard(self.connection)
            self.connection.close()
            for stream in list(self.streams.values()):
                stream.end()

    def handle(self, command: bytes, first: int, second: int, data: bytes) -> None:
        if command == b"CNXN":
            self.send(b"AUTH", TOKEN, 0, b"0123456789abcdefghij")
        elif command == b"AUTH" and first == SIGNATURE:
            self.send(b"AUTH", TOKEN, 0, b"0123456789abcdefghij")  # the key is not known yet: the host offers it
        elif command == b"AUTH" and first == PUBLIC_KEY and self.phone.authorized:
            features = "shell_v2" if self.phone.shell_v2 else ""
            about = f"device::ro.product.name=fake;ro.product.model={self.phone.model};ro.product.device=fake;features={features}"
            self.send(b"CNXN", VERSION, MAX_DATA, about.encode())
        elif command == b"OPEN":
            stream = Stream(self, len(self.streams) + 1, first)
            self.streams[stream.ours] = stream
            threading.Thread(target=stream.serve, args=(data.rstrip(b"\0").decode(),), daemon=True).start()
        elif command == b"WRTE" and second in self.streams:
            self.streams[second].receive(data)
            self.send(b"OKAY", second, first)
        elif command == b"OKAY" and second in self.streams:
            self.streams[second].ready.set()
        elif command == b"CLSE" and second in self.streams:
            self.streams[second].end()


class Stream:
    """One service that the host has opened."""

    def __init__(self, transport: Transport, ours: int, theirs: int):
        self.transport, self.phone, self.ours, self.theirs = transport, transport.phone, ours, theirs
        self.ready, self.arrived = threading.Event(), threading.Condition()
        self.buffer, self.ended = b"", False

    def receive(self, data: bytes) -> None:
        with self.arrived:
            self.buffer += data
            self.arrived.notify()

    def end(self) -> None:
        with self.arrived:
            self.ended = True
            self.arrived.notify()
        self.ready.set()

    def read(self, size: int) -> bytes:
        with self.arrived:
            self.arrived.wait_for(lambda: len(self.buffer) >= size or self.ended)
            if len(self.buffer) < size:
                raise DisconnectedError
            data, self.buffer = self.buffer[:size], self.buffer[size:]
            return data

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_DATA):
            self.ready.clear()
            self.transport.send(b"WRTE", self.ours, self.theirs, data[start : start + MAX_DATA])
            self.ready.wait()
            if self.ended:
                raise DisconnectedError

    def serve(self, service: str) -> None:
        try:
            self.transport.send(b"OKAY", self.ours, self.theirs)
            name, _, argument = service.partition(":")
            if name == "sync":
                self.sync()
            elif name.split(",")[0] == "shell":
                self.shell(argument, v2="v2" in name.split(","))
            self.transport.send(b"CLSE", self.ours, self.theirs)
        except DisconnectedError:
            return

    # --- shell

    def shell(self, command: str, v2: bool) -> None:
        time.sleep(self.phone.delay_s)
        environment = os.environ | self.phone.environment | {"FAKE_ROOT": str(self.phone.root)}
        environment["PATH"] = f"{self.phone.root}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        words = ["sh", "-c", self.phone.to_host(command)]
        process = self.phone.process = subprocess.Popen(
            words, cwd=self.phone.root, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if "--graph=" in command:
            self.phone.benchmarked.append(command.partition("--graph=")[2].split()[0].rpartition("/")[2])
            if self.phone.runs_left is not None:
                self.phone.runs_left -= 1
                if self.phone.runs_left < 0:
                    self.phone.unplug()
        output = process.stdout.read().replace(str(self.phone.root).encode(), b"")
        code = process.wait()
        if v2:
            self.write(struct.pack("<BI", STDOUT, len(output)) + output)
            self.write(struct.pack("<BIB", EXIT, 1, code & 0xFF))
        else:  # through a terminal, as on old phones
            self.write(output.replace(b"\n", b"\r\n"))

    # --- files

    def sync(self) -> None:
        while True:
            request, length = struct.unpack("<4sI", self.read(8))
            path = self.read(length).decode()
            if request == b"QUIT":
                return
            local = Path(self.phone.to_host(path.rpartition(",")[0] if request == b"SEND" else path))
            if request == b"STAT":
                status = local.stat() if local.exists() else None
                self.write(struct.pack("<4s3I", b"STAT", *((status.st_mode, status.st_size, 0) if status else (0, 0, 0))))
            elif request == b"SEND":
                self.take(local)
            elif request == b"RECV":
                if not local.is_file():
                    self.fail("No such file or directory")
                    continue
                content = local.read_bytes()
                for start in range(0, len(content), 65536):
                    part = content[start : start + 65536]
                    self.write(struct.pack("<4sI", b"DATA", len(part)) + part)
                self.write(struct.pack("<4sI", b"DONE", 0))

    def fail(self, reason: str) -> None:
        self.write(struct.pack("<4sI", b"FAIL", len(reason)) + reason.encode())

    def take(self, local: Path) -> None:
        """Receives a pushed file."""
        content = b""
        while True:
            kind, length = struct.unpack("<4sI", self.read(8))
            if kind == b"DONE":
                break
            content += self.read(length)
            if self.phone.push_limit is not None:
                self.phone.push_limit -= length
                if self.phone.push_limit < 0:
                    local.write_bytes(content[: len(content) // 2])
                    self.phone.unplug()
                    raise DisconnectedError
        if self.phone.full:
            local.write_bytes(content[: len(content) // 2])
            self.fail("write failed: No space left on device")
            return
        self.phone.received.append(local.name)
        local.write_bytes(content[:-1] if self.phone.corrupt else content)
        self.write(struct.pack("<4sI", b"OKAY", 0))


class Server:
    """An adb server of its own, on a port and with keys of its own, for the client in this process's environment."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        # Ports 5555 and up are searched for emulators unless the range is empty.
        self.environment = {"ANDROID_ADB_SERVER_PORT": str(port), "HOME": str(folder), "ADB_LOCAL_TRANSPORT_MAX_PORT": "5554"}

    def adb(self, *words: str) -> str:
        done = subprocess.run(["adb", *words], env=os.environ | self.environment, capture_output=True, text=True, timeout=30)
        return done.stdout + done.stderr

    def connect(self, phone: Phone) -> None:
        """Connects a phone, anew if it was lost; raises if it does not get into its state."""
        self.adb("disconnect", phone.serial)
        self.adb("connect", phone.serial)
        wanted = "device" if phone.authorized else "unauthorized"
        deadline = time.monotonic() + 10
        while f"{phone.serial}\t{wanted}" not in (said := self.adb("devices")):
            if time.monotonic() > deadline:
                raise RuntimeError(f"adb connect: {said}")
            time.sleep(0.02)

    def stop(self) -> None:
        self.adb("kill-server")


def have_adb() -> bool:
    """Whether the real client is installed."""
    return shutil.which("adb") is not None


def slow_down(phone: Phone, factors: dict[str, int]) -> None:
    """Makes the stand-in tool run graphs, by SHA-256, several times for one."""
    path = phone.root / "slow.json"
    path.write_text(json.dumps(factors))
    phone.environment["FAKE_SLOW"] = str(path)
