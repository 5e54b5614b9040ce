//! Clients that do their part, and what they measure: for the campaign of `tests/tests/abuse.rs`.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How many there are.
pub const CLIENTS: usize = 3;

/// Between two requests of one client: the machine shall not be full of them alone.
const THINKING: Duration = Duration::from_millis(300);

/// Between two probes.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// A probe that took longer failed.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// What honest clients measured.
#[derive(Debug, Default)]
pub struct Measured {
    first_token: Vec<Duration>,
    between_tokens: Vec<Duration>,
    whole: Vec<Duration>,
    /// What went otherwise than golden.
    pub wrong: Vec<String>,
}

impl Measured {
    /// Takes in what others measured.
    pub fn add(&mut self, other: Self) {
        self.first_token.extend(other.first_token);
        self.between_tokens.extend(other.between_tokens);
        self.whole.extend(other.whole);
        self.wrong.extend(other.wrong);
    }

    /// Streams that came to their end.
    pub fn streams(&self) -> usize {
        self.whole.len()
    }

    /// What of a hundred streams all but one took at most, from the connect to the last token.
    pub fn whole_p99(&self) -> Duration {
        quantile(&self.whole, 99)
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} streams, {} wrong; p50/p99 ms: first token {}/{}, between tokens {}/{}, whole {}/{}",
            self.whole.len(),
            self.wrong.len(),
            quantile(&self.first_token, 50).as_millis(),
            quantile(&self.first_token, 99).as_millis(),
            quantile(&self.between_tokens, 50).as_millis(),
            quantile(&self.between_tokens, 99).as_millis(),
            quantile(&self.whole, 50).as_millis(),
            quantile(&self.whole, 99).as_millis(),
        )
    }
}

/// What `percent` of a hundred took at most; nothing if there are none.
pub fn quantile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort();
    let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(rank).copied().unwrap_or_default()
}

/// The request of client `index`: sampled, so that any wrong logit shows in the tokens.
fn request(index: usize) -> String {
    let prompts = ["One day, Tom", "Once upon a time", "The little dog"];
    let request = json!({
        "prompt": prompts[index % prompts.len()],
        "max_tokens": 64, "temperature": 0.8, "seed": 7 + index, "stream": true,
        "ignore_eos": true,
    });
    request.to_string()
}

/// The answers of each client while nobody else asks.
///
/// # Panics
///
/// If there is none.
pub async fn golden(address: &str) -> Arc<Vec<String>> {
    let mut golden = Vec::new();
    for index in 0..CLIENTS {
        golden.push(stream(address, &request(index)).await.expect("an answer comes").0);
    }
    Arc::new(golden)
}

/// Streams one answer: its text, and when it was asked for and each part came.
async fn stream(address: &str, body: &str) -> Result<(String, Vec<Instant>), String> {
    let told = |error: std::io::Error| error.to_string();
    let mut moments = vec![Instant::now()];
    let mut stream = TcpStream::connect(address).await.map_err(told)?;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.map_err(told)?;
    let (mut heard, mut read, mut text) = (Vec::new(), 0, String::new());
    loop {
        if stream.read_buf(&mut heard).await.map_err(told)? == 0 {
            let all = String::from_utf8_lossy(&heard);
            return Err(format!("ended early: {}", &all[all.len().saturating_sub(300)..]));
        }
        while let Some(length) = heard[read..].iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&heard[read..read + length]).into_owned();
            read += length + 1;
            let Some(event) = line.trim_end().strip_prefix("data: ") else { continue };
            if event == "[DONE]" {
                return Ok((text, moments));
            }
            let event: Value = serde_json::from_str(event).map_err(|error| error.to_string())?;
            match event["choices"][0]["text"].as_str() {
                Some(more) => text.push_str(more),
                None => return Err(event.to_string()),
            }
            moments.push(Instant::now());
        }
    }
}

/// All clients, again and again for `span`: each compares every answer with `golden`.
///
/// # Panics
///
/// If a client panics.
pub async fn watch(address: &str, golden: &Arc<Vec<String>>, span: Duration) -> Measured {
    let mut clients = JoinSet::new();
    for index in 0..CLIENTS {
        let (address, golden) = (address.to_owned(), Arc::clone(golden));
        clients.spawn(async move {
            let body = request(index);
            let (start, mut measured) = (Instant::now(), Measured::default());
            while start.elapsed() < span {
                match stream(&address, &body).await {
                    Ok((text, moments)) => measured.note(&text, &golden[index], &moments),
                    Err(error) => measured.wrong.push(error),
                }
                sleep(THINKING).await;
            }
            measured
        });
    }
    let mut all = Measured::default();
    while let Some(measured) = clients.join_next().await {
        all.add(measured.expect("clients do not panic"));
    }
    all
}

impl Measured {
    /// A stream has ended.
    fn note(&mut self, text: &str, golden: &str, moments: &[Instant]) {
        if text != golden {
            self.wrong.push(format!("{text:?}"));
        }
        let [asked, first, .., last] = moments else {
            self.wrong.push(format!("{} parts came", moments.len() - 1));
            return;
        };
        self.first_token.push(*first - *asked);
        self.between_tokens.extend(moments[1..].windows(2).map(|pair| pair[1] - pair[0]));
        self.whole.push(*last - *asked);
    }
}

/// How long `/livez` takes, four times a second for `span`; a failure counts as forever.
pub async fn probe(address: &str, span: Duration) -> Vec<Duration> {
    let (start, mut times) = (Instant::now(), Vec::new());
    while start.elapsed() < span {
        let asked = Instant::now();
        let asking = async {
            let mut stream = TcpStream::connect(address).await?;
            let get =
                format!("GET /livez HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
            stream.write_all(get.as_bytes()).await?;
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).await?;
            std::io::Result::Ok(heard.starts_with(b"HTTP/1.1 200"))
        };
        let fine = matches!(timeout(PROBE_LIMIT, asking).await, Ok(Ok(true)));
        times.push(if fine { asked.elapsed() } else { Duration::MAX });
        sleep(PROBE_INTERVAL).await;
    }
    times
}
