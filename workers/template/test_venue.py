"""MyExchange: a documented signature, and everything that fmzbus asks of a venue. Run it with pytest."""

import asyncio

from workers.check import check
from workers.template.venue import MyExchange, sign


def test_a_known_signature() -> None:
    """CHANGE: the worked example of the exchange's page on authentication."""
    body = b'{"symbol":"BTC_USDT","side":"buy","type":"limit","price":"50000","amount":"0.01"}'
    signature = sign("demo-secret", timestamp="1795168693000", window="5000", verb="POST", target="/api/v1/orders", body=body)
    assert signature == "352757ba4ef9996cfd5d3fbcc8598331a5853bf8a7f7c71f35ddf2015c9f1477"  # pragma: allowlist secret


def test_conformance() -> None:
    """CHANGE: check(MyExchange, base_url="https://testnet...", keys=(access, secret), symbol=...), and trade=True to place small orders."""
    asyncio.run(check(MyExchange))
