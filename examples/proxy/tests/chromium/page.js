// What a web page can do with the proxy: each function returns what the page sees, as JSON.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";
import { io } from "socket.io-client";

const MODEL = "selam-turbo";

/** Calls a client, and returns its result, or what the page can tell of the error. */
async function seen(call) {
  try {
    return await call();
  } catch (error) {
    return {
      error: error.constructor.name,
      status: error.status ?? error.statusCode ?? null,
      code: error.code ?? error.data?.error?.code ?? null,
      message: error.message,
    };
  }
}

async function collect(iterable, piece) {
  const pieces = [];
  for await (const item of iterable) pieces.push(piece(item));
  return pieces.join("");
}

globalThis.scenarios = {
  openai: (proxy, apiKey, said) => {
    const client = new OpenAI({ baseURL: `${proxy}/v1`, apiKey, dangerouslyAllowBrowser: true, maxRetries: 0 });
    const messages = [{ role: "user", content: said }];
    return Promise.all([
      seen(async () => {
        const { choices } = await client.chat.completions.create({ model: MODEL, messages });
        return choices[0].message.content;
      }),
      seen(async () => {
        const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true });
        return collect(stream, (chunk) => chunk.choices[0].delta.content ?? "");
      }),
    ]);
  },

  aiSdk: (proxy, apiKey, said) => {
    const provider = createOpenAICompatible({ name: "selam", baseURL: `${proxy}/v1`, apiKey });
    const options = { model: provider(MODEL), prompt: said, maxRetries: 0 };
    return Promise.all([
      seen(async () => (await generateText(options)).text),
      seen(async () => {
        let failure;
        const { textStream } = streamText({ ...options, onError: ({ error }) => (failure = error) });
        const text = await collect(textStream, (piece) => piece);
        if (failure) throw failure;
        return text;
      }),
    ]);
  },

  /** Sends one request, and returns status, body and the headers that the page may read. */
  fetch: (url, { token, ...options } = {}) =>
    seen(async () => {
      const headers = { ...options.headers, ...(token && { authorization: `Bearer ${token}` }) };
      const response = await fetch(url, { ...options, headers });
      return { status: response.status, headers: Object.fromEntries(response.headers), body: await response.text() };
    }),

  eventSource: (url) =>
    new Promise((resolve) => {
      const [source, events] = [new EventSource(url), []];
      source.onmessage = ({ data }) => {
        events.push(data);
        if (data === "last") finish(events);
      };
      source.onerror = () => finish("error");
      const finish = (result) => {
        source.close();
        resolve(result);
      };
    }),

  webSocket: (url, protocols, text) =>
    new Promise((resolve) => {
      const socket = new WebSocket(url, protocols);
      socket.onopen = () => socket.send(text);
      socket.onmessage = ({ data }) => {
        resolve({ protocol: socket.protocol, data });
        socket.close();
      };
      socket.onclose = ({ code }) => resolve({ closed: code });
    }),

  /** Talks to the voice agent: returns what it echoes, or why the session did not open. */
  socketIo: (proxy, transports, token, said) =>
    new Promise((resolve) => {
      const query = { voice: said, ...(token && { token }) };
      const socket = io(`${proxy}/v1/audio/agent`, { transports, query, forceNew: true, reconnection: false });
      const { engine } = socket.io;
      let upgraded = false;
      const finish = (result) => {
        resolve(result);
        socket.close();
      };
      const talk = () => socket.connected && upgraded === transports.length > 1 && socket.emit("say", said, new Uint8Array([1, 2]));
      engine.once("upgrade", () => {
        upgraded = true;
        talk();
      });
      socket.on("connect", talk);
      socket.on("say", (data, bytes) => {
        finish({ transport: engine.transport.name, upgraded, data, bytes: [...new Uint8Array(bytes)] });
      });
      socket.on("connect_error", ({ message, context }) => {
        finish({ error: message, status: context?.status ?? null, body: context?.responseText ?? null });
      });
      socket.on("disconnect", (reason) => finish({ error: reason }));
    }),
};
