// Talks to the voice agent through the proxy, with the official Socket.IO client. Runs one scenario and prints what happened as
// a line of JSON:
//
//     CLIENT_TOKEN=TOKEN node client.js PROXY SCENARIO TRANSPORTS HOW
//
// TRANSPORTS is a list such as `polling,websocket`. HOW says where the token is: `query`, `api_key`, `header`, `auth` or `protocol`.

import { createRequire } from "node:module";

const { io } = createRequire(import.meta.url)("socket.io-client");

const [proxy, scenario, transports, how] = process.argv.slice(2);
const token = process.env.CLIENT_TOKEN;
const namespace = scenario === "namespace" ? "/other" : "/v1/audio/agent";

const options = { transports: transports.split(","), forceNew: true, reconnection: false, query: { voice: "mekdes" } };
if (how === "query") options.query.token = token;
if (how === "api_key") options.query.api_key = token;
if (how === "header") options.extraHeaders = { authorization: `Bearer ${token}` };
if (how === "protocol") options.protocols = ["chat", `openai-insecure-api-key.${token}`];
if (how === "auth") {
  options.extraHeaders = { authorization: `Bearer ${token}` };
  options.auth = { token, api_key: token, voice: "mekdes", other: token };
}

const socket = io(proxy + namespace, options);
const engine = socket.io.engine;
const seen = { upgraded: false };
const limit = setTimeout(() => finish("timed out"), 60_000);

function finish(end, more) {
  clearTimeout(limit);
  console.log(JSON.stringify({ end, transport: socket.io.engine?.transport?.name, ...seen, ...more }));
  socket.close();
  process.exit(0);
}

function once(event) {
  return new Promise((resolve) => socket.once(event, (...values) => resolve(values)));
}

engine.once("upgrade", () => (seen.upgraded = true));
socket.on("connect_error", (error) =>
  finish("connect error", { message: error.message, data: error.data, status: error.description, body: error.context?.responseText }),
);
socket.on("disconnect", (reason, details) => finish("disconnected", { reason, code: details?.description }));

socket.on("connect", async () => {
  if (transports === "polling,websocket") {
    while (!seen.upgraded) await new Promise((resolve) => engine.once("upgrade", resolve));
  }
  const audio = Buffer.alloc(100_000, 7);
  const echoes = [once("text"), once("audio")];
  socket.emit("text", "ሰላም", { n: 1 });
  socket.emit("audio", audio, "and text");
  const [[text, object], [binary, more]] = await Promise.all(echoes);
  const acknowledged = await socket.timeout(60_000).emitWithAck("acked", { a: [audio] }, 5);
  seen.echoed =
    text === "ሰላም" && object.n === 1 && Buffer.compare(Buffer.from(binary), audio) === 0 && more === "and text";
  seen.acknowledged = Buffer.compare(Buffer.from(acknowledged.a?.[0] ?? acknowledged[0].a[0]), audio) === 0;
  if (scenario === "stay") {
    // Until the test ends the session, or tells it to go on. It has a time limit too.
    clearTimeout(limit);
    console.log(JSON.stringify({ ready: true }));
    process.stdin.once("data", async () => {
      const again = once("text");
      socket.emit("text", "again");
      seen.again = (await again)[0];
      finish("done");
    });
    return;
  }
  finish("done");
});
