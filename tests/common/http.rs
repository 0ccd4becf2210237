//! A small HTTP client and a served engine, for tests.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use gqla::engine::{Config, Engine};
use gqla::server::{self, Options};
use serde_json::Value;

/// A template in the manner of the bundled tokenizer's special tokens.
pub const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}\
    {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";

/// A copy of a checkpoint with a chat template.
pub fn with_template(checkpoint: &Path, template: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(checkpoint).unwrap().flatten() {
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    std::fs::write(copy.path().join("chat_template.jinja"), template).unwrap();
    copy
}

/// A router served in this process on a free port.
pub struct Server {
    pub address: SocketAddr,
    pub engine: Engine,
    runtime: tokio::runtime::Runtime,
    _model: tempfile::TempDir,
}

impl Server {
    /// One rank as a thread; `set` changes the defaults.
    pub fn start(checkpoint: &Path, config: Config, set: impl FnOnce(&mut Options)) -> Server {
        Server::with_template(checkpoint, TEMPLATE, config, set)
    }

    pub fn with_template(checkpoint: &Path, template: &str, config: Config, set: impl FnOnce(&mut Options)) -> Server {
        let server = Server::cold(checkpoint, template, config, set);
        server::warm_up(&server.engine).unwrap();
        server
    }

    /// Without the step that makes it ready.
    pub fn cold(checkpoint: &Path, template: &str, config: Config, set: impl FnOnce(&mut Options)) -> Server {
        let model = with_template(checkpoint, template);
        let engine = Engine::start_threads(config, 1).unwrap();
        let mut options = Options::new(model.path());
        options.name = Some("tiny".into());
        options.access_log = false;
        set(&mut options);
        let router = server::router(engine.clone(), options).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let never = std::future::pending();
        runtime.spawn(server::serve(listener, router, Duration::from_secs(1), Duration::from_secs(1), never));
        Server { address, engine, runtime, _model: model }
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        request(self.address, "POST", path, &[], Some(body.to_string().as_bytes()))
    }

    pub fn get(&self, path: &str) -> Response {
        request(self.address, "GET", path, &[], None)
    }

    pub fn stop(self) {
        let _ = self.engine.shutdown();
        self.runtime.shutdown_timeout(Duration::from_millis(100));
    }
}

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
    /// The connection ended before the body did.
    pub cut: bool,
}

impl Response {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|h| h.0.eq_ignore_ascii_case(name)).map(|h| h.1.as_str())
    }

    /// The data of server-sent events; fails on anything else in the body.
    pub fn events(&self) -> Vec<String> {
        let frames = self.body.split("\n\n").filter(|f| !f.is_empty());
        frames.map(|f| f.strip_prefix("data: ").unwrap_or_else(|| panic!("not an event: {f:?}")).to_string()).collect()
    }

    /// The chunks of a stream that ended as it should.
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!((events.pop().as_deref(), self.cut), (Some("[DONE]"), false), "{self:?}");
        events.iter().map(|e| serde_json::from_str(e).unwrap()).collect()
    }

    /// The error's message, in OpenAI's form.
    pub fn error(&self) -> String {
        let body = self.json();
        let error = &body["error"];
        assert!(error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some(), "{body}");
        error["message"].as_str().unwrap().to_string()
    }
}

/// Sends a request and returns the connection, from which nothing has been read.
pub fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Option<&[u8]>,
) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if let Some(body) = body {
        if !headers.iter().any(|h| h.0.eq_ignore_ascii_case("content-type")) {
            head += "Content-Type: application/json\r\n";
        }
        if !headers.iter().any(|h| h.0.eq_ignore_ascii_case("content-length")) {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
    }
    stream.write_all((head + "\r\n").as_bytes())?;
    stream.write_all(body.unwrap_or_default())?;
    Ok(stream)
}

/// Reads a whole response.
pub fn read(stream: TcpStream) -> std::io::Result<Response> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or(std::io::ErrorKind::InvalidData)?;
    let mut headers = vec![];
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.push((name.to_string(), value.to_string()));
    }
    let find = |name: &str| headers.iter().find(|h| h.0.eq_ignore_ascii_case(name)).map(|h| h.1.clone());
    let (mut bytes, mut cut) = (vec![], false);
    if find("transfer-encoding").is_some() {
        loop {
            line.clear();
            if reader.read_line(&mut line).is_err() {
                cut = true;
                break;
            }
            let Ok(length) = usize::from_str_radix(line.trim_end(), 16) else {
                cut = true;
                break;
            };
            let mut chunk = vec![0; length + 2];
            if reader.read_exact(&mut chunk).is_err() {
                cut = true;
                break;
            }
            bytes.extend(&chunk[..length]);
            if length == 0 {
                break;
            }
        }
    } else {
        let length: usize = find("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
        cut = reader.read_to_end(&mut bytes).is_err() || bytes.len() < length;
    }
    Ok(Response { status, headers, body: String::from_utf8_lossy(&bytes).into_owned(), cut })
}

/// A request and its response.
pub fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Option<&[u8]>,
) -> Response {
    let response =
        read(send(address, method, path, headers, body).unwrap()).unwrap_or_else(|e| panic!("{method} {path}: {e}"));
    assert!(is_documented(method, path, response.status), "{method} {path} is not described as giving {response:?}");
    response
}

/// Whether the description of the routes knows this status; of a route or method that it does not know, 401 (as
/// everywhere without the key), 404 and 405.
fn is_documented(method: &str, path: &str, status: u16) -> bool {
    let document = serde_json::to_value(server::document()).unwrap();
    let route = if path.starts_with("/v1/models/") { "/v1/models/{model}" } else { path };
    match document["paths"][route].get(method.to_lowercase()) {
        Some(operation) => operation["responses"].get(status.to_string()).is_some(),
        None => [401, 404, 405].contains(&status),
    }
}
