"""Check the pinned versions for known vulnerabilities with pip-audit: `make audit`.

The exit code is 1 if a vulnerability is not listed in `tools/audit_accepted.txt`, or if that file lists a fixed one. If
no advisory service can be reached, or it knows none of the packages, the check reports this and passes, because the
network is no fault of the pins.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = ("constraints.txt", "constraints-vllm.txt")
ACCEPTED = Path(__file__).with_name("audit_accepted.txt")
SERVICES = ("pypi", "osv")


def accepted() -> dict[str, str]:
    """Return the reason for each accepted vulnerability, by its identifier."""
    lines = [line.split(maxsplit=1) for line in ACCEPTED.read_text("utf-8").splitlines()]
    return {words[0]: words[1] for words in lines if len(words) == 2 and not words[0].startswith("#")}


def audited(program: str, pins: Path, service: str) -> list[dict[str, object]] | str:
    """Return the packages that the service knows, with their vulnerabilities, or the reason for a failed check."""
    command = [program, "-s", service, "--disable-pip", "--no-deps", "-r", str(pins), "-f", "json"]
    done = subprocess.run(
        [*command, "--progress-spinner", "off", "--timeout", "15"], capture_output=True, text=True, check=False
    )
    try:
        listed = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    known = [package for package in listed if "skip_reason" not in package]
    return known or f"it knows none of the {len(listed)} packages"


def main(program: str) -> int:
    """Audit all pins and return the exit code."""
    vulnerable: dict[str, str] = {}
    looked, services = False, [*SERVICES]
    for name in PINS:
        for service in [*services]:
            packages = audited(program, ROOT / name, service)
            if isinstance(packages, str):
                print(f"audit: {name}: advisory service {service!r} gave nothing: {packages}")
                services.remove(service)
                continue
            looked = True
            print(f"audit: {name}: {len(packages)} packages looked up at {service!r}")
            for package in packages:
                vulnerabilities = package["vulns"]
                assert isinstance(vulnerabilities, list)
                for one in vulnerabilities:
                    vulnerable[one["id"]] = (
                        f"{package['name']} {package['version']}: mended in {one['fix_versions'] or '?'}"
                    )
            break
    if not looked:
        print("audit: NOTHING WAS AUDITED, as no advisory service answered; run it where there is one")
        return 0
    known = accepted()
    for name in sorted(set(vulnerable) - set(known)):
        print(f"audit: {name}: {vulnerable[name]}; raise the pin, or list it in {ACCEPTED.name} with a reason")
    for name in sorted(set(known) - set(vulnerable)):
        print(f"audit: {name} is accepted but no longer there; remove it from {ACCEPTED.name}")
    print(f"audit: {len(vulnerable)} known vulnerabilities, {len(set(vulnerable) & set(known))} of them accepted")
    return int(set(vulnerable) != set(known))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
