"""The last line of defence: what looks like a key is blanked in a finished log line."""

import pytest

from bus.logs import redact


@pytest.mark.parametrize(
    ("line", "redacted"),
    [
        ('{"access_key":"AK1","n":1}', '{"access_key":"***","n":1}'),
        ('{"Secret-Key": "SK1"}', '{"Secret-Key": "***"}'),
        ("https://x.com/a?apikey=AK1&n=1", "https://x.com/a?apikey=***&n=1"),
        ("api_key=AK1", "api_key=***"),
        ("passphrase: hunter2", "passphrase: ***"),
        ("PASSWORD=hunter2,", "PASSWORD=***,"),
        ("mac_key=00ff", "mac_key=***"),
        ("signature=00ff&sign=00ff", "signature=***&sign=***"),
        ("Paper-Sign: 00ff", "Paper-Sign: ***"),
        ("paper-secret: s1", "paper-secret: ***"),
        (r"{\"secret_key\":\"SK1\"}", r"{\"secret_key\":\"***\"}"),
        ("nats://worker:pw1@127.0.0.1:4222", "nats://worker:***@127.0.0.1:4222"),
        ('{"event":"write","idempotency_key":"1f2e","outcome":"ok"}', '{"event":"write","idempotency_key":"1f2e","outcome":"ok"}'),
    ],
)
def test_what_looks_like_a_key_is_blanked(line: str, redacted: str) -> None:
    assert redact(line) == redacted
