"""Secrets among the files that git tracks, by the forms of keys and tokens.

Rules that guess by entropy or by the names of variables are left out: here they find digests and the names of Secrets
only, and a list of a hundred known exceptions is read by nobody.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from detect_secrets.core.scan import scan_line
from detect_secrets.settings import transient_settings

from audit.report import Finding, Result

DETECTORS = (
    "ArtifactoryDetector",
    "AWSKeyDetector",
    "AzureStorageKeyDetector",
    "BasicAuthDetector",
    "CloudantDetector",
    "DiscordBotTokenDetector",
    "GitHubTokenDetector",
    "GitLabTokenDetector",
    "IbmCloudIamDetector",
    "JwtTokenDetector",
    "MailchimpDetector",
    "NpmDetector",
    "OpenAIDetector",
    "PrivateKeyDetector",
    "PypiTokenDetector",
    "SendGridDetector",
    "SlackDetector",
    "SquareOAuthDetector",
    "StripeDetector",
    "TelegramBotTokenDetector",
    "TwilioKeyDetector",
)
OWN = (("Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")),)
ALLOWED = "allow-secret:"
"""A line that has it, and why after it, is an example."""
_MAX_LINE = 4096
_WORTH_A_LOOK = re.compile(r"[A-Za-z0-9+/_=-]{16}|://|PRIVATE KEY")
"""What every rule asks for, so that most lines are passed over."""


def secrets(root: Path) -> Result:
    """Every line that looks like one."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.split("\0") if name and (root / name).is_file()]
    findings: list[Finding] = []
    with transient_settings({"plugins_used": [{"name": name} for name in DETECTORS]}):
        for name in names:
            for number, line in enumerate((root / name).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if ALLOWED in line or not _WORTH_A_LOOK.search(line) or "--hash=sha256:" in line:
                    continue
                kinds = {found.type for found in scan_line(line[:_MAX_LINE])}
                kinds |= {kind for kind, pattern in OWN if pattern.search(line)}
                findings += [Finding(f"{name}:{number}", kind) for kind in sorted(kinds)]
    return Result(f"{len(names):,} tracked files, {len(findings)} that look like secrets", tuple(findings))
