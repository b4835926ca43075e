"""Mistakes of one line or two, planted into the template: what each is, the check that must name it, and what it must have seen."""

Edits = list[tuple[str, str]]

SEND = (
    "        answer = await call.send(verb, self._base + target, headers=headers, body=content or None)  # once, and within the deadline\n"
)
BLOCKING = """\
        connection = http.client.HTTPConnection(self._base.removeprefix("http://"), timeout=1)
        with contextlib.closing(connection):
            connection.request(verb, target, content, headers)
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read(), call)
"""
TRIED = "        try:\n    " + SEND

MISTAKES: dict[str, tuple[Edits, str, str]] = {
    # mistake: (edits of the template, the check that must name it, what it must have seen)
    "records in ms": ([("m.Candle(row[0] // 1000,", "m.Candle(row[0],")], "records", r"is ms; expected whole SECONDS"),
    "depth reversed": ([("sorted(bids, reverse=True)", "sorted(bids)")], "depth", r"bids do not descend"),
    "trades descending": ([("in sorted(tape)]", "in sorted(tape, reverse=True)]")], "trades", r"times do not ascend"),
    "float amounts": (
        [('"amount": m.plain(params.amount)}', '"amount": str(float(params.amount))}')],
        "numbers-exact",
        r"amount 0\.00000001 was sent as .*1e-08",
    ),
    "retry on a failure": (
        [(SEND, TRIED + "        except BusError:\n    " + SEND)],
        "writes-sent-once",
        r"no answer in time.*the exchange got it 2 times",
    ),
    "timeout told as refusal": (
        [(SEND, TRIED + "        except BusError as e:\n            raise VenueRejected(str(e)) from e\n")],
        "orders-unclear",
        r"no answer in time.*venue_rejected: .*expected outcome unknown",
    ),
    "id through float": (
        [('return m.Placed(str(row["id"]))', 'return m.Placed(str(int(float(row["id"]))))')],
        "ids-large",
        r"the exchange said 9007199254740993123, the host is told '900719925474099\d+'",
    ),
    "swallowed error code": (
        [("if answer.status >= 400:", "if answer.status >= 500:")],
        "cancel-refused",
        r'the exchange said {"code":2012',
    ),
    "error told without the exchange's words": (
        [("(f\"{call.exchange} {reply['code']} {reply['message']}\")", '("refused")')],
        "refusals",
        r"the exchange said 'amount: 9000000000 .*the host reads 'refused'",
    ),
    "None for an unknown order": (
        [
            (
                '        return order(await self._send(call, "GET", f"/orders/{quote(params.id, safe=\'\')}"))\n',
                '        try:\n            return order(await self._send(call, "GET", f"/orders/{quote(params.id, safe=\'\')}"))\n'
                "        except NotFound:\n            return None\n",
            )
        ],
        "order-unknown",
        r"order answered null for the unknown id",
    ),
    "cancel not looked at": (
        [
            (
                '        await self._send(call, "DELETE", f"/orders/{quote(params.id, safe=\'\')}")\n',
                '        try:\n            await self._send(call, "DELETE", f"/orders/{quote(params.id, safe=\'\')}")\n'
                "        except VenueRejected:\n            pass\n",
            )
        ],
        "cancel-refused",
        r"cancel answered true",
    ),
    "key in error text": (
        [("{reply['message']}\")", "{reply['message']} {headers}\")")],
        "keys-kept",
        r"the worker had to blank a key in the error text",
    ),
    "public call signed": (
        [
            (
                '"GET", "/ticker", {"symbol": instrument(params.symbol)}, signed=False',
                '"GET", "/ticker", {"symbol": instrument(params.symbol)}',
            )
        ],
        "public-honest",
        r"ticker is public, and sends a key: header paper-key",
    ),
    "market buy in base": (
        [('("quote_amount" if params.side == "buy" else "amount")', '"amount"')],
        "market-orders",
        r"was amount taken as base\?|not enough|insufficient",
    ),
    "symbols with regard to case": (
        [("SYMBOLS.get(symbol.upper(), symbol.upper())", "SYMBOLS.get(symbol, symbol)")],
        "symbols-any-case",
        r"btc_usdt: ticker answered venue_rejected",
    ),
    "an order id that may be missing": (
        [('        if not row.get("id"):\n            raise call.unclear("without an order id")', "        if False:\n            pass")],
        "orders-without-id",
        r"null for the id trade answered",
    ),
    "a client order id that is not sent": (
        [(', "client_order_id": call.client_order_id}', "}")],
        "lookups-honest",
        r"was not sent with the order",
    ),
    "a cancellation swallowed": (
        [(SEND, TRIED + '        except BaseException as e:\n            raise call.unclear("nothing") from e\n')],
        "cancellation",
        r"the cancelled call went on and answered",
    ),
    "a lock held while waiting": (
        [
            (SEND, "        async with self._lock:\n    " + SEND),
            ("        self._base = (", "        self._lock = asyncio.Lock()\n        self._base = ("),
            ("import hmac\n", "import asyncio\nimport hmac\n"),
        ],
        "slow-calls-apart",
        r"while ticker waited for the exchange depth answered timed_out",
    ),
    "keys remembered": (
        [
            (
                "secret, timestamp = call.credentials.secret_key",
                "self._keys = getattr(self, '_keys', None) or call.credentials\n            secret, timestamp = self._keys.secret_key",
            ),
            ('"Paper-Key": call.credentials.access_key', '"Paper-Key": self._keys.access_key'),
        ],
        "keys-per-call",
        r"shows the first account's: header paper-key",
    ),
    "an address of its own": (
        [("(settings.base_url or BASE_URL)", "BASE_URL")],
        "base-url",
        r"no request came to",
    ),
    "an HTTP client of its own that blocks": (
        [
            (SEND, BLOCKING),
            ("import hmac\n", "import contextlib\nimport hmac\nimport http.client\n"),
            ("from workers.http import Call\n", "from workers.http import Answer, Call\n"),
        ],
        "slow-calls-apart",
        r"ticker blocked the event loop",
    ),
}

LOSSES: dict[str, tuple[Edits, str, str]] = {
    # of these only the check that must name them is made
    **{
        f"a market of its own in {method}": ([(old, new)], "symbols-unknown", seen)
        for method, old, new, seen in (
            (
                "depth",
                '"/depth", {"symbol": instrument(params.symbol)}',
                '"/depth", {"symbol": "BTC_USDT"}',
                r"depth: NOSUCH_ZZZ was asked for as .*BTC_USDT",
            ),
            (
                "trades",
                '"/trades", {"symbol": instrument(params.symbol)}',
                '"/trades", {"symbol": "BTC_USDT"}',
                r"trades: NOSUCH_ZZZ was asked for as",
            ),
            (
                "records",
                'query = {"symbol": instrument(params.symbol)',
                'query = {"symbol": "BTC_USDT"',
                r"records: NOSUCH_ZZZ was asked for as",
            ),
            (
                "trade",
                'body = {"symbol": instrument(params.symbol)',
                'body = {"symbol": "BTC_USDT"',
                r"an order of NOSUCH_ZZZ was sent as",
            ),
        )
    },
    "find_order: None on any error": (
        [("        except NotFound:  # nothing", "        except BusError:  # nothing")],
        "lookups-honest",
        r"on a connection dropped .* find_order\(\) answered None",
    ),
    "find_order: None on a refusal": (
        [("        except NotFound:  # nothing", "        except VenueRejected:  # nothing")],
        "lookups-honest",
        r"on a wrong secret find_order\(\) answered None",
    ),
    "filled told as open": (
        [('"closed": "closed"', '"closed": "open"')],
        "market-orders",
        r"a filled order has status open; expected closed",
    ),
    "nothing told as filled": ([("deal_amount=done", "deal_amount=m.number(0)")], "market-orders", r"has deal_amount 0"),
    "no average price": ([("avg_price=average", "avg_price=m.number(0)")], "market-orders", r"has avg_price 0; the day's"),
    "price for the average price": ([("avg_price=average", "avg_price=price")], "order-status", r"a resting order has avg_price 31"),
    "amount is what remains": (
        [("amount=amount or done", "amount=amount - done")],
        "market-orders",
        r"a filled sell of [\d.]+ has amount 0",
    ),
    "orders of every symbol": (
        [('{"symbol": instrument(params.symbol)} if params.symbol else None', "None")],
        "orders",
        r"of BTC_USDT: the symbol is ignored",
    ),
    "no orders on a refusal": (
        [
            (
                '        rows = await self._send(call, "GET", "/orders"',
                "        try:\n            await self._send(call, 'GET', '/orders')\n        except VenueRejected:\n            return []\n"
                '        rows = await self._send(call, "GET", "/orders"',
            )
        ],
        "refusals-keys",
        r"with a wrong secret orders answered \[\]",
    ),
    "the period ignored": ([('"interval": params.period_m', '"interval": 1')], "records", r"bars of 1440 minutes are \[60\] s apart"),
    "records in another time zone": ([("row[0] // 1000,", "row[0] // 1000 + 28800,")], "records", r"2\d{4} s in the future"),
    "records in a zone behind": ([("row[0] // 1000,", "row[0] // 1000 - 28800,")], "records", r"minutes is 2\d{4} s old"),
    "open and close exchanged": (
        [("*map(m.number, row[1:6]))", "*map(m.number, (row[4], row[2], row[3], row[1], row[5])))")],
        "records",
        r"are open and close exchanged",
    ),
    "prices of two digits": (
        [('"price": m.plain(params.price)', '"price": f"{params.price:.2f}"')],
        "numbers-exact",
        r"price 0\.00000013 was sent as",
    ),
    "prices of six digits": (
        [('"price": m.plain(params.price)', '"price": f"{params.price:.6f}"')],
        "numbers-exact",
        r"price 1234567\.123456789567 was sent as",
    ),
    "a status guessed": (
        [('STATUS[row["status"]]', 'STATUS.get(row["status"], "open")')],
        "order-status",
        r"said status zzz, and order answered",
    ),
    "free and frozen exchanged": (
        [('m.number(row["free"]), m.number(row["frozen"])', 'm.number(row["frozen"]), m.number(row["free"])')],
        "balances-frozen",
        r"USDT free \+[\d.]+ frozen -",
    ),
    "keys printed": (
        [("        answer = await call.send(", "        print(headers)\n        answer = await call.send(")],
        "keys-kept",
        r"what the venue prints holds the secret key",
    ),
    "a pause that blocks": (
        [
            (
                '        row = await self._send(call, "GET", "/ticker"',
                '        time.sleep(0.4)\n        row = await self._send(call, "GET", "/ticker"',
            ),
            ("import hmac\n", "import hmac\nimport time\n"),
        ],
        "slow-calls-apart",
        r"stood still, .*more than 0\.15 s at planted\d+\.py:\d+ ticker\(\)",
    ),
    "an end of the process": (
        [
            (
                '        book = await self._send(call, "GET", "/depth"',
                '        raise SystemExit(3)\n        book = await self._send(call, "GET", "/depth"',
            )
        ],
        "depth",
        r"depth answered internal|the venue raised SystemExit",
    ),
}
