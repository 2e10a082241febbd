"""Two NATs and some public addresses, in namespaces of this process; for punch tests.

    pub: bridge 198.51.100.0/24 with .10-.14
     |- nat A ext .21, lan 192.168.1.1 -- host A 192.168.1.2 (or host A at .21 itself)
     |- nat B ext .22, lan 192.168.2.1 -- host B 192.168.2.2

Kinds: "drop" (endpoint-independent mapping, filters by address and port, silently),
"rst" (the same, answers RST), "sym" (another port for each connection), "adf" (filters
by address only), "seq" (another port for each connection, the next one), "public" (no
NAT).
"""

import os
import shutil
import subprocess

NET = "198.51.100"
SEQUENTIAL = 40
"""Ports of a sequential NAT, each used once and in order."""


def missing():
    """Return why there is no lab here, or an empty string."""
    if os.geteuid() != 0:
        return "needs root"
    for tool in ("ip", "iptables", "sysctl"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    probe = f"punchprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True)
    if made.returncode:
        return "cannot make network namespaces"
    rules = ("iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
    works = subprocess.run(["ip", "netns", "exec", probe, *rules], capture_output=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return "cannot use iptables' NAT" if works.returncode else ""


class Lab:
    def __init__(self, kind_a, kind_b):
        self.prefix = f"pu{os.getpid()}"
        self.kinds = {"A": kind_a, "B": kind_b}
        self.processes = []

    def name(self, short):
        return f"{self.prefix}{short}"

    def run(self, short, command):
        done = subprocess.run(
            ["ip", "netns", "exec", self.name(short), *command.split()],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def start(self, short, *command):
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name(short), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def __enter__(self):
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        for short in ("hA", "hB", "nA", "nB", "pub"):
            subprocess.run(
                ["ip", "netns", "del", self.name(short)], capture_output=True
            )

    def _build(self):
        self._space("pub")
        self.run("pub", "ip link add br0 type bridge")
        self.run("pub", "ip link set br0 up")
        for last in range(10, 15):
            self.run("pub", f"ip addr add {NET}.{last}/24 dev br0")
        for number, site in enumerate("AB", 1):
            if self.kinds[site] == "public":
                self._space(f"h{site}")
                self._plug(f"h{site}", site, f"{NET}.2{number}")
            else:
                self._site(site, number)

    def _site(self, site, number):
        nat, host = f"n{site}", f"h{site}"
        self._space(nat)
        self._space(host)
        self._plug(nat, site, f"{NET}.2{number}")
        lan = f"192.168.{number}"
        pair = f"ip link add lan type veth peer name eth0 netns {self.name(host)}"
        self.run(nat, pair)
        self.run(nat, f"ip addr add {lan}.1/24 dev lan")
        self.run(nat, "ip link set lan up")
        self.run(host, f"ip addr add {lan}.2/24 dev eth0")
        self.run(host, "ip link set eth0 up")
        self.run(host, f"ip route add default via {lan}.1")
        self.run(nat, "sysctl -qw net.ipv4.ip_forward=1")
        self._rules(nat, self.kinds[site], f"{lan}.2")

    def _rules(self, nat, kind, inside):
        def rule(text):
            self.run(nat, f"iptables {text}")

        how = " --random-fully" if kind == "sym" else ""
        if kind == "seq":
            self._count_ports(nat)
        else:
            rule(f"-t nat -A POSTROUTING -o ext -j MASQUERADE{how}")
        if kind == "adf":
            rule(
                f"-t nat -A PREROUTING -i ext -p tcp -j DNAT --to-destination {inside}"
            )
            seen = f"-m recent --name {self.prefix}{nat}"
            rule(f"-A FORWARD -o ext {seen} --rdest --set")
            rule(
                f"-A FORWARD -i ext -m conntrack --ctstate NEW {seen} --rsource "
                "--rcheck -j ACCEPT"
            )
        if kind != "rst":
            rule("-A INPUT -i ext -m conntrack --ctstate NEW,INVALID -j DROP")
        rule("-A FORWARD -i ext -m conntrack --ctstate NEW,INVALID -j DROP")

    def _count_ports(self, nat):
        """The nth connection gets the nth port: a rule for each of them."""
        for n in range(SEQUENTIAL):
            self.run(
                nat,
                "iptables -t nat -A POSTROUTING -o ext -p tcp -m statistic --mode nth "
                f"--every {SEQUENTIAL - n} --packet 0 -j MASQUERADE "
                f"--to-ports {30_000 + n}",
            )

    def _space(self, short):
        subprocess.run(["ip", "netns", "add", self.name(short)], check=True)
        self.run(short, "ip link set lo up")

    def _plug(self, short, site, ip):
        pair = f"ip link add wan{site} type veth peer name ext netns {self.name(short)}"
        self.run("pub", pair)
        self.run("pub", f"ip link set wan{site} master br0 up")
        self.run(short, f"ip addr add {ip}/24 dev ext")
        self.run(short, "ip link set ext up")
