//! The responses of the API to accepted requests, and helpers to build responses.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode,
    header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, SEC_WEBSOCKET_ACCEPT, UPGRADE},
};
use serde_json::{Value, json};
use sha1::{Digest, Sha1};

use super::{SimulatorBody, api::Answer, jwt::epoch_seconds};
use crate::util::clock;

pub(super) fn chat(body: &Value) -> Answer {
    let model = model(body);
    let reply = reply(body);
    if body["stream"] != true {
        return json(&completion(model, &reply));
    }
    let event = |delta: Value, finish: Option<&str>| {
        let chunk = json!({
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": epoch_seconds(clock::now()),
            "model": model,
            "choices": [{ "index": 0, "delta": delta, "finish_reason": finish }],
        });
        Bytes::from(format!("data: {chunk}\n\n"))
    };
    let words = reply.split_inclusive(' ').map(|word| event(json!({ "content": word }), None));
    let events = words.chain([event(json!({}), Some("stop")), Bytes::from_static(b"data: [DONE]\n\n")]);
    answered(StatusCode::OK, "text/event-stream", SimulatorBody::stream(events))
}

pub(super) fn batch(body: &Value) -> Answer {
    let requests = body["requests"].as_array().map(Vec::as_slice).unwrap_or_default();
    let responses: Vec<_> =
        requests.iter().map(|request| completion(model(request), &reply(request))).collect();
    json(&json!({ "responses": responses }))
}

fn completion(model: &str, reply: &str) -> Value {
    let tokens = reply.split_whitespace().count();
    json!({
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": epoch_seconds(clock::now()),
        "model": model,
        "choices": [{
            "index": 0,
            "message": { "role": "assistant", "content": reply },
            "finish_reason": "stop",
        }],
        "usage": { "prompt_tokens": tokens, "completion_tokens": tokens, "total_tokens": 2 * tokens },
    })
}

fn model(body: &Value) -> &str {
    body["model"].as_str().unwrap_or("selam-plus")
}

fn reply(body: &Value) -> String {
    let last = body["messages"].as_array().and_then(|messages| messages.last());
    match last.and_then(|message| message["content"].as_str()) {
        Some(said) => format!("Selam! You said: {said}"),
        None => "Selam!".to_owned(),
    }
}

pub(super) fn image() -> Answer {
    json(&json!({
        "created": epoch_seconds(clock::now()),
        "data": [{ "url": "https://images.example/selam.png" }],
    }))
}

pub(super) fn session(body: &Value) -> Answer {
    json(&json!({ "object": "audio.agent.session", "id": "session_1", "voice": body["voice"] }))
}

pub(super) fn speech() -> Answer {
    answered(StatusCode::OK, "audio/wav", SimulatorBody::whole(tone()))
}

/// Accepts a WebSocket handshake: [RFC 6455 section 4.2.2](https://www.rfc-editor.org/rfc/rfc6455#section-4.2.2).
pub(super) fn switch_to_websocket(nonce: &HeaderValue) -> Answer {
    let accept =
        Sha1::new().chain_update(nonce).chain_update("258EAFA5-E914-47DA-95CA-C5AB0DC85B11").finalize();
    let mut answer = Response::new(SimulatorBody::stream([]));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    set(headers, &SEC_WEBSOCKET_ACCEPT, &BASE64_STANDARD.encode(accept));
    answer
}

/// A WAV file with 0.1 s of 440 Hz, 8-bit mono at 8 kHz.
fn tone() -> Bytes {
    const RATE: u32 = 8_000;
    let samples = (0..RATE / 10).map(|at| if (at * 440 * 2 / RATE).is_multiple_of(2) { 0xa0 } else { 0x60 });
    let samples: Vec<u8> = samples.collect();
    let length = samples.len() as u32;
    let mut wav = BytesMut::new();
    let numbers = |wav: &mut BytesMut, numbers: &[u32]| {
        numbers.iter().for_each(|number| wav.extend_from_slice(&number.to_le_bytes()));
    };
    wav.extend_from_slice(b"RIFF");
    numbers(&mut wav, &[36 + length]);
    wav.extend_from_slice(b"WAVEfmt ");
    // Format PCM (1) and 1 channel, then 1 byte per block and 8 bits per sample.
    numbers(&mut wav, &[16, 1 | 1 << 16, RATE, RATE, 1 | 8 << 16]);
    wav.extend_from_slice(b"data");
    numbers(&mut wav, &[length]);
    wav.extend_from_slice(&samples);
    wav.freeze()
}

pub(super) fn html(status: StatusCode) -> Answer {
    let page = format!("<!DOCTYPE html>\n<html><head><title>{status}</title></head><body></body></html>\n");
    answered(status, "text/html; charset=UTF-8", SimulatorBody::whole(page))
}

/// JSON with `Cache-Control: no-store`.
pub(super) fn uncached_json(status: StatusCode, body: &Value) -> Answer {
    let mut answer = answered(status, "application/json", SimulatorBody::whole(body.to_string()));
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

fn json(body: &Value) -> Answer {
    answered(StatusCode::OK, "application/json", SimulatorBody::whole(body.to_string()))
}

pub(super) fn answered(status: StatusCode, content_type: &'static str, body: SimulatorBody) -> Answer {
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

pub(super) fn set(headers: &mut HeaderMap, name: &HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}
