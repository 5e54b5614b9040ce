//! The least HTTP/1.1 client: one request, one connection, for tests that look at bytes.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// How long a server may be silent.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How long a stream may be silent: a change of plan on a busy machine, and more.
const STREAM_TIMEOUT: Duration = Duration::from_secs(60);

/// An answer with its body read to the end.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header lines as they came.
    pub headers: String,
    /// Body, chunks joined.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    ///
    /// If it is not JSON.
    pub fn json(&self) -> serde_json::Value {
        let found = serde_json::from_str(&self.body);
        found.unwrap_or_else(|error| panic!("{error} in {:?}", self.body))
    }
}

/// `GET path` from `address` (`host:port`).
///
/// # Errors
///
/// What the socket said, or that the answer is not HTTP.
pub fn get(address: &str, path: &str) -> io::Result<Answer> {
    request(address, "GET", path, "")
}

/// `POST path` with a JSON body.
///
/// # Errors
///
/// What the socket said, or that the answer is not HTTP.
pub fn post(address: &str, path: &str, body: &serde_json::Value) -> io::Result<Answer> {
    request(address, "POST", path, &body.to_string())
}

/// Any request with a body that is sent as JSON.
///
/// # Errors
///
/// What the socket said, or that the answer is not HTTP.
pub fn request(address: &str, method: &str, path: &str, body: &str) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    parse(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("not HTTP: {text:?}")))
}

/// A streamed completion that came to its end.
#[derive(Clone, Debug)]
pub struct Streamed {
    /// The texts of its parts, joined.
    pub text: String,
    /// The longest time between two reads that brought something, the first token included.
    pub longest_gap: Duration,
}

/// `POST path` with a JSON body that asks for a stream, read to `[DONE]`.
///
/// # Errors
///
/// What went otherwise, with what was heard last.
pub fn stream(address: &str, path: &str, body: &serde_json::Value) -> Result<Streamed, String> {
    let told = |error: io::Error| error.to_string();
    let body = body.to_string();
    let mut socket = TcpStream::connect(address).map_err(told)?;
    socket.set_read_timeout(Some(STREAM_TIMEOUT)).map_err(told)?;
    write!(
        socket,
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .map_err(told)?;
    let (mut heard, mut last, mut longest_gap) = (Vec::new(), Instant::now(), Duration::ZERO);
    let mut part = [0; 16 << 10];
    loop {
        let count = socket.read(&mut part).map_err(told)?;
        longest_gap = longest_gap.max(last.elapsed());
        last = Instant::now();
        if count == 0 {
            break;
        }
        heard.extend_from_slice(&part[..count]);
    }
    let answer = String::from_utf8_lossy(&heard);
    let tail = || {
        format!(
            "...{}",
            &answer
                .chars()
                .rev()
                .take(300)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .collect::<String>()
        )
    };
    let answer = parse(&answer).ok_or_else(tail)?;
    if answer.status != 200 || !answer.body.contains("data: [DONE]") {
        return Err(format!("{}: {}", answer.status, tail()));
    }
    let mut text = String::new();
    for line in answer.body.lines().filter_map(|line| line.strip_prefix("data: {")) {
        let event: serde_json::Value =
            serde_json::from_str(&format!("{{{line}")).map_err(|error| error.to_string())?;
        if !event["error"].is_null() {
            return Err(event["error"].to_string());
        }
        let choice = &event["choices"][0];
        let part = choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str());
        text.push_str(part.unwrap_or_default());
    }
    Ok(Streamed { text, longest_gap })
}

fn parse(text: &str) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let (status_line, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    let status = status_line.split(' ').nth(1)?.parse().ok()?;
    let is_chunked = headers.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if is_chunked { join_chunks(body)? } else { body.into() };
    Some(Answer { status, headers: headers.into(), body })
}

fn join_chunks(mut rest: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (length, after) = rest.split_once("\r\n")?;
        let length = usize::from_str_radix(length.trim(), 16).ok()?;
        if length == 0 {
            return Some(body);
        }
        body.push_str(after.get(..length)?);
        rest = after.get(length..)?.strip_prefix("\r\n")?;
    }
}
