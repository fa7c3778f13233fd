// Drives Chromium: web pages on an origin that the proxies list, and on one that they do not.
//
//     node driver.js CHROMIUM PROFILE
//
// The first line that it prints is the port of its pages; it then reads what it needs to know from the first line of its
// input, as JSON. Everything that pages received follows, and "all is well" at the end.

import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http";
import { createInterface } from "node:readline/promises";

import { build } from "esbuild";
import { chromium } from "playwright-core";

const [executablePath, profile] = process.argv.slice(2);

const bundle = await build({ entryPoints: ["page.js"], bundle: true, format: "esm", write: false, logLevel: "error" });
const files = {
  "/": ["text/html", '<!DOCTYPE html><link rel="icon" href="data:,"><script type="module" src="page.js"></script>'],
  "/page.js": ["text/javascript", bundle.outputFiles[0].contents],
};
const pages = createServer(({ url }, response) => {
  const [type, content] = files[url];
  response.setHeader("content-type", type).end(content);
});
await once(pages.listen(0, "127.0.0.1"), "listening");
const { port } = pages.address();
console.log(port);

const input = createInterface({ input: process.stdin });
const [line] = await once(input, "line");
input.close();
const { authenticated, local, voice, token, demo, screenshots } = JSON.parse(line);

// Generous, for busy machines.
const timeout = 120_000;
const browser = await chromium.launchPersistentContext(profile, {
  executablePath,
  timeout,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});

browser.setDefaultTimeout(timeout);

// Everything that a page receives, for the search for secrets.
const received = [];
browser.on("response", (response) => {
  received.push(
    Promise.all([response.url(), response.allHeaders(), response.text()]).catch(({ message }) => [response.url(), message]),
  );
});
browser.on("page", (page) => {
  page.on("console", (message) => received.push(message.text()));
  page.on("websocket", (socket) => socket.on("framereceived", ({ payload }) => received.push(`${payload}`)));
});

async function open(url) {
  const page = await browser.newPage();
  await page.goto(url);
  return page;
}

/** Runs a scenario on a page. */
async function run(page, name, ...arguments_) {
  const result = await page.evaluate(([name, arguments_]) => scenarios[name](...arguments_), [name, arguments_]);
  console.log(name, JSON.stringify(result));
  return result;
}

/** Of Socket.IO: polling and then an upgrade, and WebSocket alone. */
const TRANSPORTS = [["polling", "websocket"], ["websocket"]];

const ws = (url) => url.replace("http", "ws");

async function listed(page) {
  const said = "one two three";
  const reply = `Selam! You said: ${said}`;
  for (const client of ["openai", "aiSdk"]) {
    assert.deepEqual(await run(page, client, authenticated, token, said), [reply, reply]);
    for (const error of await run(page, client, authenticated, "wrong", said)) {
      assert.deepEqual([error.status, error.code], [401, "invalid_api_key"]);
      assert.match(error.message, /Invalid API key provided/);
    }
    assert.deepEqual(await run(page, client, local, "unused", said), [reply, reply]);
  }

  const chat = {
    token,
    method: "POST",
    headers: { "content-type": "application/json", "x-new-header": "1" },
    body: JSON.stringify({ messages: [{ role: "user", content: said }], stream: true }),
  };
  const stream = await run(page, "fetch", `${authenticated}/v1/chat/completions`, chat);
  assert.match(stream.body, /^data: .*data: \[DONE\]\n\n$/s);
  assert.match(stream.headers["x-request-id"], /^req_/);

  // An error of the API, with all that a client needs to try again, and with headers that it may not set.
  const limited = await run(page, "fetch", `${authenticated}/v1/limited`, { token });
  assert.equal(limited.status, 429);
  assert.equal(JSON.parse(limited.body).error.code, "rate_limit_exceeded");
  for (const name of ["retry-after", "retry-after-ms", "x-ratelimit-remaining", "x-ratelimit-reset-after", "x-request-id"]) {
    assert.ok(limited.headers[name], `${name} is not exposed`);
  }
  assert.equal(limited.headers["x-not-exposed"], undefined);

  // Errors of the proxy itself.
  for (const [path, options, status, code] of [
    ["/v1/chat/completions", { method: "POST" }, 401, "missing_api_key"],
    ["/v1/files", { token }, 403, "insufficient_permissions"],
    ["/v1/files/1", { token, method: "DELETE" }, 403, "insufficient_permissions"],
    ["/elsewhere", { token }, 404, "not_found"],
    ["/healthz", { token, method: "POST" }, 405, "method_not_allowed"],
    ["/v1/broken", { token }, 502, "response_headers_too_large"],
  ]) {
    const answer = await run(page, "fetch", `${authenticated}${path}`, options);
    assert.equal(answer.status, status, path);
    assert.equal(JSON.parse(answer.body).error.code, code);
  }
  assert.equal((await run(page, "fetch", `${authenticated}/v1/options`, { token, method: "OPTIONS" })).body, "from the API");
  assert.equal((await run(page, "fetch", `${authenticated}/v1/limited`, { token, credentials: "include" })).error, "TypeError");

  assert.deepEqual(await run(page, "eventSource", `${local}/v1/events`), ["first", "last"]);
  // It cannot send a token.
  assert.equal(await run(page, "eventSource", `${authenticated}/v1/events`), "error");

  const live = `${ws(authenticated)}/v1/live`;
  for (const [protocols, protocol] of [
    [["realtime", `openai-insecure-api-key.${token}`, "openai-beta.realtime-v1"], "realtime"],
    [["bearer", token], "bearer"],
  ]) {
    assert.deepEqual(await run(page, "webSocket", live, protocols, said), { protocol, data: said });
  }
  assert.deepEqual(await run(page, "webSocket", `${ws(local)}/v1/live`, [], said), { protocol: "", data: said });
  // No answer to these: the API chose none, and the only one is the token's.
  assert.deepEqual(await run(page, "webSocket", live, [`bearer.${token}`], said), { closed: 1006 });
  assert.deepEqual(await run(page, "webSocket", live, ["realtime", "bearer.wrong"], said), { closed: 1006 });

  for (const transports of TRANSPORTS) {
    const echo = { transport: "websocket", upgraded: transports.length > 1, data: said, bytes: [1, 2] };
    assert.deepEqual(await run(page, "socketIo", voice.authenticated, transports, token, said), echo);
    assert.deepEqual(await run(page, "socketIo", voice.local, transports, null, said), echo);
  }
  for (const [wrong, code] of [
    ["wrong", "invalid_api_key"],
    [null, "missing_api_key"],
  ]) {
    const polling = await run(page, "socketIo", voice.authenticated, TRANSPORTS[0], wrong, said);
    assert.deepEqual([polling.status, JSON.parse(polling.body).error.code], [401, code]);
    const { error } = await run(page, "socketIo", voice.authenticated, TRANSPORTS[1], wrong, said);
    assert.equal(error, "websocket error");
  }
}

async function unlisted(page) {
  const said = "unlisted";
  for (const proxy of [authenticated, local]) {
    for (const client of ["openai", "aiSdk"]) {
      for (const error of await run(page, client, proxy, token, said)) assert.equal(error.status, null);
    }
    for (const options of [{}, { token }, { token, method: "POST", body: said }, { method: "POST", body: said }]) {
      const answer = await run(page, "fetch", `${proxy}/v1/limited?${said}`, options);
      assert.deepEqual([answer.error, answer.message], ["TypeError", "Failed to fetch"]);
    }
    // Sent without CORS, it gets an answer that the page cannot read.
    const opaque = await run(page, "fetch", `${proxy}/v1/limited?${said}`, { mode: "no-cors", method: "POST", body: said });
    assert.deepEqual([opaque.status, opaque.body], [0, ""]);
    assert.equal(await run(page, "eventSource", `${proxy}/v1/events?${said}`), "error");
    for (const protocols of [[], ["realtime", `bearer.${token}`]]) {
      assert.deepEqual(await run(page, "webSocket", `${ws(proxy)}/v1/live?${said}`, protocols, said), { closed: 1006 });
    }
  }
  for (const proxy of Object.values(voice)) {
    for (const transports of TRANSPORTS) {
      const { error, status, body } = await run(page, "socketIo", proxy, transports, token, said);
      const blocked = transports.length > 1 ? ["xhr poll error", 0, ""] : ["websocket error", null, null];
      assert.deepEqual([error, status, body], blocked);
    }
  }
}

/** The example `browser`. */
async function chat() {
  const page = await open(demo);
  const requests = [];
  page.on("request", (request) => requests.push(new URL(request.url()).hostname));
  await page.getByLabel("Message").fill("one two three");
  await page.keyboard.press("Enter");
  await page.locator(".note", { hasText: /^req_.* requests left$/ }).waitFor();
  assert.equal(await page.locator(".answer").innerText(), "Selam! You said: one two three");
  await page.getByRole("button", { name: "Use a wrong token" }).click();
  const error = await page.getByRole("alert").innerText();
  assert.match(error, /^401 invalid_api_key\n.*client token/s);
  if (screenshots) {
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      await page.screenshot({ path: `${screenshots}/${colorScheme}.png` });
    }
    await page.setViewportSize({ width: 390, height: 700 });
    await page.screenshot({ path: `${screenshots}/narrow.png` });
  }
  assert.deepEqual(new Set(requests), new Set(["127.0.0.1"]));

  const other = await open(demo.replace("127.0.0.1", "localhost"));
  await other.getByRole("button", { name: "Say hello" }).click();
  assert.match(await other.getByRole("alert").innerText(), /^Blocked by the browser\n/);
}

await listed(await open(`http://localhost:${port}/`));
await unlisted(await open(`http://127.0.0.1:${port}/`));
await chat();
await browser.close();
pages.close();
console.log(JSON.stringify(await Promise.all(received)));
console.log("all is well");
