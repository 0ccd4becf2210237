//! The server in OpenAI's wire format: every route, every bound at plus and minus one, streams and their ends, the key,
//! disconnects, slow readers, overload, shutdown; and `gqla serve` as a process.

#[path = "common/http.rs"]
mod http;
#[path = "common/model.rs"]
mod model;

use std::io::Read;
use std::time::{Duration, Instant};

use gqla::server::template::{Bounds, Message, Template};
use http::{Response, Server, request};
use serde_json::{Value, json};

fn server(set: impl FnOnce(&mut gqla::server::Options)) -> Server {
    Server::start(&model::checkpoint("tiny-glm-gqla").0, model::config("tiny-glm-gqla", None), set)
}

fn until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const PROMPT: &str = "def fibonacci(n):";

fn complete(extra: Value) -> Value {
    let mut body = json!({"prompt": PROMPT, "max_tokens": 12, "temperature": 0});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// The text that chunks add up to, and the finish reasons they carry.
fn joined(chunks: &[Value]) -> (String, Vec<String>) {
    let choices = || chunks.iter().flat_map(|c| c["choices"].as_array().unwrap());
    let text = choices().map(|c| c["text"].as_str().or(c["delta"]["content"].as_str()).unwrap_or("")).collect();
    (text, choices().filter_map(|c| c["finish_reason"].as_str().map(str::to_string)).collect())
}

#[test]
fn completions_stream_what_they_answer_whole() {
    let s = server(|_| {});
    let whole = s.post("/v1/completions", &complete(json!({}))).json();
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    assert_eq!(whole["usage"]["prompt_tokens"], 10);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let text = whole["choices"][0]["text"].as_str().unwrap();

    let streamed =
        s.post("/v1/completions", &complete(json!({"stream": true, "stream_options": {"include_usage": true}})));
    assert_eq!(streamed.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let chunks = streamed.chunks();
    assert_eq!(joined(&chunks), (text.to_string(), vec!["length".to_string()]));
    let last = chunks.last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));

    // Token ids are the same prompt; two prompts with two choices each are four, numbered in order.
    let ids = s.post("/tokenize", &json!({"prompt": PROMPT})).json()["tokens"].clone();
    let by_id = s.post("/v1/completions", &complete(json!({"prompt": ids}))).json();
    assert_eq!(by_id["choices"][0]["text"], text);
    let many = s.post("/v1/completions", &complete(json!({"prompt": [PROMPT, "import os\n"], "n": 2}))).json();
    let indices: Vec<_> = many["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(many["choices"][0]["text"], text);
    assert_ne!(many["choices"][2]["text"], text);
    assert_eq!(many["usage"]["completion_tokens"], 48);
    s.stop();
}

#[test]
fn stop_strings_end_the_text_before_themselves() {
    let s = server(|_| {});
    let free = s.post("/v1/completions", &complete(json!({"max_tokens": 30}))).json();
    let text = free["choices"][0]["text"].as_str().unwrap();
    // Every cut of three characters out of the text: over token boundaries too.
    for at in (0..text.len() - 3).step_by(3) {
        let stop = &text[at..at + 3];
        let want = &text[..text.find(stop).unwrap()];
        for logprobs in [Value::Null, json!(0)] {
            let extra = json!({"max_tokens": 30, "stop": [stop, "never"], "stream": true, "logprobs": logprobs});
            let chunks = s.post("/v1/completions", &complete(extra)).chunks();
            assert_eq!(joined(&chunks), (want.to_string(), vec!["stop".to_string()]), "{stop:?}");
            let tokens = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["tokens"].as_array()).flatten();
            let tokens: String = tokens.map(|t| t.as_str().unwrap()).collect();
            assert!(want.starts_with(&tokens), "a token leaks the stop string: {tokens:?}");
        }
    }
    let token = s.post("/tokenize", &json!({"prompt": text, "add_special_tokens": false})).json()["tokens"][2].clone();
    let ended = s.post("/v1/completions", &complete(json!({"stop_token_ids": [token]}))).json();
    assert_eq!(ended["choices"][0]["finish_reason"], "stop");

    // The end of the text is all that may be chosen: it ends at once, not before the least length, or not at all.
    let end = |extra: Value| {
        let mut body = complete(json!({"logit_bias": {"0": 100}, "max_tokens": 6}));
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let answer = s.post("/v1/completions", &body).json();
        (answer["choices"][0]["finish_reason"].clone(), answer["usage"]["completion_tokens"].clone())
    };
    assert_eq!(end(json!({})), (json!("stop"), json!(1)));
    assert_eq!(end(json!({"min_tokens": 4})), (json!("stop"), json!(5)));
    assert_eq!(end(json!({"ignore_eos": true})), (json!("length"), json!(6)));
    assert_eq!(
        end(json!({"logit_bias": {"5": 100}, "stop_token_ids": [5], "min_tokens": 2})),
        (json!("stop"), json!(3))
    );
    s.stop();
}

#[test]
fn the_same_seed_is_the_same_text_whatever_runs_beside_it() {
    let s = server(|_| {});
    let sampled = json!({"temperature": 1.0, "top_p": 0.95, "seed": 7, "max_tokens": 24, "n": 3});
    let alone = s.post("/v1/completions", &complete(sampled.clone())).json()["choices"].clone();
    assert_ne!(alone[0]["text"], alone[1]["text"], "choices have their own draws");
    std::thread::scope(|scope| {
        for i in 0..6 {
            let body = complete(json!({"max_tokens": 40 + i, "temperature": 1.5}));
            let s = &s;
            scope.spawn(move || assert_eq!(s.post("/v1/completions", &body).status, 200));
        }
        assert_eq!(s.post("/v1/completions", &complete(sampled.clone())).json()["choices"], alone);
    });
    let one =
        s.post("/v1/completions", &complete(json!({"temperature": 1.0, "top_p": 0.95, "seed": 7, "max_tokens": 24})));
    assert_eq!(one.json()["choices"][0]["text"], alone[0]["text"]);
    s.stop();
}

#[test]
fn log_probabilities_of_prompt_and_text_line_up() {
    let s = server(|_| {});
    let c = &s.post("/v1/completions", &complete(json!({"echo": true, "logprobs": 2, "max_tokens": 3}))).json()["choices"]
        [0];
    let l = &c["logprobs"];
    let lists = ["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(|n| l[n].as_array().unwrap().clone());
    assert!(lists.iter().all(|x| x.len() == 13));
    assert_eq!((&lists[1][0], &lists[2][0]), (&Value::Null, &Value::Null));
    let text = c["text"].as_str().unwrap();
    assert!(text.starts_with(PROMPT));
    for i in 1..13 {
        let (token, offset) = (lists[0][i].as_str().unwrap(), lists[3][i].as_u64().unwrap() as usize);
        assert_eq!(&text[offset..offset + token.len()], token);
        let p = lists[1][i].as_f64().unwrap();
        let top: Vec<f64> = lists[2][i].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).collect();
        assert!(p <= 0.0 && top.contains(&p) && top.iter().all(|t| *t <= 0.0) && (2..=3).contains(&top.len()));
    }
    // As lm-eval asks: no token, one token; the prompt's own figures are the same.
    for max_tokens in [0, 1] {
        let body = complete(json!({"echo": true, "logprobs": 2, "max_tokens": max_tokens}));
        let again = s.post("/v1/completions", &body).json();
        let given = again["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
        assert_eq!(given.len(), 10 + max_tokens);
        assert_eq!(given[..10], lists[1][..10]);
    }
    let by_id = s.post("/v1/completions", &complete(json!({"prompt_logprobs": 1}))).json();
    let entries = by_id["choices"][0]["prompt_logprobs"].as_array().unwrap().clone();
    assert_eq!((entries.len(), &entries[0]), (10, &Value::Null));
    assert!(entries[1].as_object().unwrap().values().any(|e| e["rank"] == 1));
    s.stop();
}

#[test]
fn chats_follow_the_template() {
    let s = server(|_| {});
    let messages = json!([{"role": "user", "content": "def f(x):"}]);
    let tokens = s.post("/tokenize", &json!({"messages": messages})).json();
    assert_eq!(tokens["tokens"].as_array().unwrap()[..2], [json!(1), json!(2)]);
    assert_eq!(tokens["tokens"].as_array().unwrap().last(), Some(&json!(3)));
    let text = s.post("/detokenize", &json!({"tokens": tokens["tokens"]})).json();
    assert_eq!(text["prompt"], "def f(x):");

    let body = json!({"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0, "logprobs": true, "top_logprobs": 2});
    let whole = s.post("/v1/chat/completions", &body).json();
    let answer = &whole["choices"][0];
    assert_eq!((&whole["object"], &answer["message"]["role"]), (&json!("chat.completion"), &json!("assistant")));
    let tokens = answer["logprobs"]["content"].as_array().unwrap();
    assert!(tokens.len() == 8 && tokens.iter().all(|t| t["top_logprobs"].as_array().unwrap().len() == 2));
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let chunks = s.post("/v1/chat/completions", &streamed).chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(joined(&chunks).0, answer["message"]["content"].as_str().unwrap());
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "def f(x):"}]}]);
    let same = s.post("/v1/chat/completions", &json!({"messages": parts, "max_tokens": 8, "temperature": 0})).json();
    assert_eq!(same["choices"][0]["message"]["content"], answer["message"]["content"]);
    s.stop();

    let plain = gqla::engine::Engine::start_threads(model::config("tiny-glm-gqla", None), 1).unwrap();
    let options = gqla::server::Options::new(model::checkpoint("tiny-glm-gqla").0);
    assert!(gqla::server::router(plain.clone(), options).is_ok(), "no template is no error until a chat comes");
    plain.shutdown().unwrap();
}

fn refused(r: &Response, status: u16, about: &str) {
    assert_eq!(r.status, status, "{r:?}");
    assert!(r.error().contains(about), "{} does not mention {about:?}", r.error());
}

#[test]
fn every_bound_holds_at_plus_and_minus_one() {
    let s = server(|o| {
        let l = &mut o.limits;
        (l.body, l.prompt_tokens, l.max_tokens, l.prompts) = (4000, 20, 30, 3);
        (l.n, l.stops, l.stop_bytes, l.logit_bias, l.logprobs, l.messages) = (4, 2, 5, 3, 6, 3);
        l.template_bytes = 60;
    });
    let bias = |n: usize| (0..n).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>();
    type Extra = Box<dyn Fn(usize) -> Value>;
    let cases: Vec<(&str, usize, Extra)> = vec![
        ("n", 4, Box::new(|n| json!({"n": n, "max_tokens": 1}))),
        ("prompt", 20, Box::new(|n| json!({"prompt": vec![5; n]}))),
        ("prompt", 20, Box::new(|n| json!({"prompt": " x".repeat(n), "add_special_tokens": false}))),
        ("prompt", 3, Box::new(|n| json!({"prompt": vec!["x"; n]}))),
        ("max_tokens", 30, Box::new(|n| json!({"max_tokens": n}))),
        ("stop", 2, Box::new(|n| json!({"stop": vec!["@@"; n]}))),
        ("stop", 5, Box::new(|n| json!({"stop": "@".repeat(n)}))),
        ("stop_token_ids", 2, Box::new(|n| json!({"stop_token_ids": vec![9; n]}))),
        ("logit_bias", 3, Box::new(move |n| json!({"logit_bias": bias(n)}))),
        ("logprobs", 6, Box::new(|n| json!({"logprobs": n}))),
        ("prompt_logprobs", 6, Box::new(|n| json!({"prompt_logprobs": n}))),
    ];
    for (field, most, extra) in cases {
        for within in [most - 1, most] {
            let r = s.post("/v1/completions", &complete(extra(within)));
            assert_eq!(r.status, 200, "{field} {within}: {r:?}");
        }
        let r = s.post("/v1/completions", &complete(extra(most + 1)));
        refused(&r, 400, field);
        assert_eq!(r.json()["error"]["param"], field, "{r:?}");
    }
    let chat = |messages: Value| s.post("/v1/chat/completions", &json!({"messages": messages, "max_tokens": 1}));
    let message = |text: &str| json!({"role": "user", "content": text});
    for (count, status) in [(2, 200), (3, 200), (4, 400), (0, 400)] {
        assert_eq!(chat(json!(vec![message("x"); count])).status, status, "{count} messages");
    }
    // "<|begin|>", "<|user|>" and "<|assistant|>" take 30 of the 60 bytes.
    for (length, status) in [(29, 200), (30, 200), (31, 400)] {
        assert_eq!(chat(json!([message(&"x".repeat(length))])).status, status, "{length} bytes");
    }
    let empty = complete(json!({"user": ""})).to_string().len();
    for (bytes, status) in [(3999, 200), (4000, 200), (4001, 413)] {
        let body = complete(json!({"user": "u".repeat(bytes - empty)}));
        assert_eq!(body.to_string().len(), bytes);
        assert_eq!(s.post("/v1/completions", &body).status, status, "{bytes} bytes");
    }
    // A body that says nothing of its length is cut off at the bound too.
    let body = format!("{:x}\r\n{}\r\n0\r\n\r\n", 4001, " ".repeat(4001));
    let chunked = [("Transfer-Encoding", "chunked"), ("Content-Length", "")];
    let mut raw = std::net::TcpStream::connect(s.address).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n";
    std::io::Write::write_all(&mut raw, format!("{head}{}: chunked\r\n\r\n{body}", chunked[0].0).as_bytes()).unwrap();
    assert_eq!(http::read(raw).unwrap().status, 413);
    s.stop();
}

#[test]
fn the_context_is_a_bound_too() {
    let s = server(|_| {});
    let context = s.get("/v1/models").json()["data"][0]["max_model_len"].as_u64().unwrap() as usize;
    let ids = vec![5; 20];
    for (most, status) in [(context - 21, 200), (context - 20, 200), (context - 19, 400)] {
        let body = json!({"prompt": ids, "max_tokens": most, "stop_token_ids": [], "temperature": 0});
        let r = s.post("/v1/completions", &body);
        assert_eq!(r.status, status, "{r:?}");
        if status == 400 {
            assert_eq!(r.json()["error"]["code"], "context_length_exceeded");
        }
    }
    let r = s.post("/v1/completions", &json!({"prompt": vec![5; context + 1], "max_tokens": 1}));
    refused(&r, 400, "context");
    // A text of words has a token each, which is told without tokenising it.
    let words = |n: usize| " x".repeat(n);
    let bos = s.post("/tokenize", &json!({"prompt": words(9)})).json()["count"].as_u64().unwrap() as usize - 9;
    for (most, status) in [(7, 200), (8, 200), (9, 400)] {
        let body = json!({"prompt": words(context - 8 - bos), "max_tokens": most, "temperature": 0});
        let r = s.post("/v1/completions", &body);
        assert_eq!(r.status, status, "{r:?}");
    }
    let far = words(10 * context);
    for body in [json!({"prompt": far}), json!({"prompt": ["x", far]})] {
        let r = s.post("/v1/completions", &body);
        refused(&r, 400, "at least");
        assert_eq!(r.json()["error"]["code"], "context_length_exceeded");
    }
    let messages = json!([{"role": "user", "content": far}]);
    refused(&s.post("/v1/chat/completions", &json!({"messages": messages})), 400, "at least");
    s.stop();
}

#[test]
fn what_cannot_be_served_is_refused_in_openais_words() {
    let s = server(|_| {});
    let bad = |extra: Value, about: &str| refused(&s.post("/v1/completions", &complete(extra)), 400, about);
    bad(json!({"prompt": []}), "prompt");
    bad(json!({"prompt": [4096]}), "4096");
    bad(json!({"prompt": {"a": 1}}), "does not fit");
    bad(json!({"temperature": -0.1}), "temperature");
    bad(json!({"temperature": "hot"}), "does not fit");
    bad(json!({"top_p": 0}), "top_p");
    bad(json!({"top_p": 1.01}), "top_p");
    bad(json!({"top_k": -2}), "top_k");
    bad(json!({"min_p": 2}), "min_p");
    bad(json!({"presence_penalty": 101}), "presence_penalty");
    bad(json!({"logit_bias": {"x": 1}}), "logit_bias");
    bad(json!({"logit_bias": {"4096": 1}}), "logit_bias");
    bad(json!({"logit_bias": {"1": 101}}), "logit_bias");
    bad(json!({"n": 0}), "n:");
    bad(json!({"stop": ""}), "stop");
    bad(json!({"best_of": 2}), "best_of");
    bad(json!({"suffix": "x"}), "suffix");
    bad(json!({"stream": true, "echo": true, "logprobs": 1}), "stream");
    let chat = |body: Value, about: &str| refused(&s.post("/v1/chat/completions", &body), 400, about);
    let messages = json!([{"role": "user", "content": "x"}]);
    chat(json!({"messages": []}), "messages");
    chat(json!({"messages": messages, "tools": [{}]}), "tools");
    chat(json!({"messages": messages, "response_format": {"type": "json_object"}}), "response_format");
    chat(json!({"messages": messages, "top_logprobs": 1}), "logprobs");
    chat(json!({"messages": messages, "max_tokens": 0}), "max_tokens");
    chat(json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "image_url");
    refused(&s.post("/tokenize", &json!({})), 400, "prompt");
    refused(&s.post("/detokenize", &json!({"tokens": [4096]})), 400, "4096");
    let r = s.post("/v1/completions", &complete(json!({"model": "other"})));
    refused(&r, 404, "other");
    assert_eq!(r.json()["error"]["code"], "model_not_found");
    refused(&s.get("/v1/models/other"), 404, "other");
    refused(&s.get("/nothing"), 404, "/nothing");
    let r = s.get("/v1/completions");
    refused(&r, 405, "GET");
    assert_eq!(r.header("allow"), Some("POST"));
    let raw =
        |kind: &str, body: &[u8]| request(s.address, "POST", "/v1/completions", &[("Content-Type", kind)], Some(body));
    refused(&raw("application/json", b"{"), 400, "does not fit");
    refused(&raw("application/json", b"\xff\xfe"), 400, "does not fit");
    refused(&raw("text/plain", b"{}"), 415, "application/json");
    // Deep nesting is refused, not followed.
    refused(&raw("application/json", "[".repeat(100_000).as_bytes()), 400, "does not fit");
    s.stop();
}

#[test]
fn templates_refuse_and_are_bounded() {
    let of = |template: &str| {
        let config = model::config("tiny-glm-gqla", None);
        Server::with_template(&model::checkpoint("tiny-glm-gqla").0, template, config, |_| {})
    };
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
    let s = of("{{ raise_exception('only systems speak') }}");
    refused(&s.post("/v1/chat/completions", &body), 400, "only systems speak");
    s.stop();
    let s = of("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}");
    let begin = Instant::now();
    refused(&s.post("/v1/chat/completions", &body), 400, "work");
    assert!(begin.elapsed() < Duration::from_secs(10));
    s.stop();
    // One instruction decides.
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let loaded = http::with_template(&model::checkpoint("tiny-glm-gqla").0, template);
    let loaded = Template::load(loaded.path()).unwrap().unwrap();
    let renders = |work: u64| {
        let message = Message { role: "user".into(), content: "x".into(), name: None };
        loaded.render(&[message], true, &Default::default(), Bounds { work, bytes: 100 }).is_ok()
    };
    let least = (1..).find(|work| renders(*work)).unwrap();
    assert!(!renders(least - 1) && renders(least) && renders(least + 1));
    let s = Server::with_template(
        &model::checkpoint("tiny-glm-gqla").0,
        template,
        model::config("tiny-glm-gqla", None),
        |o| o.limits.template_work = least,
    );
    assert_eq!(s.post("/v1/chat/completions", &body).status, 200);
    let two = json!({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]});
    refused(&s.post("/v1/chat/completions", &two), 400, "work");
    s.stop();
}

#[test]
fn the_key_is_wanted_everywhere_but_at_health() {
    let s = server(|o| o.api_key = Some("secret".into()));
    let routes = [
        ("GET", "/"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/ready"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
    ];
    for (method, path) in routes {
        for headers in [&[][..], &[("Authorization", "Bearer secre")], &[("Authorization", "Bearer secret1")]] {
            let r = request(s.address, method, path, headers, Some(b"{}"));
            assert_eq!(r.status, 401, "{path}");
            assert!(r.error().contains("key"));
        }
        let r = request(s.address, method, path, &[("Authorization", "Bearer secret")], Some(b"{}"));
        assert_ne!(r.status, 401, "{path}");
    }
    assert_eq!(s.get("/health").status, 200);
    s.stop();
}

#[test]
fn a_server_is_ready_once_a_step_has_passed() {
    let (checkpoint, config) = (model::checkpoint("tiny-glm-gqla").0, model::config("tiny-glm-gqla", None));
    let s = Server::cold(&checkpoint, http::TEMPLATE, config, |_| {});
    assert_eq!((s.get("/health").status, s.get("/ready").status), (200, 503));
    refused(&s.get("/ready"), 503, "no step");
    gqla::server::warm_up(&s.engine).unwrap();
    assert_eq!(s.get("/ready").status, 200);
    s.engine.close();
    refused(&s.get("/ready"), 503, "shutting down");
    refused(&s.post("/v1/completions", &complete(json!({}))), 503, "shutting down");
    s.stop();
}

#[test]
fn state_is_told() {
    let s = server(|_| {});
    assert_eq!((s.get("/health").status, s.get("/ready").status), (200, 200));
    let long = vec![7; 200];
    for _ in 0..2 {
        assert_eq!(s.post("/v1/completions", &json!({"prompt": long, "max_tokens": 4})).status, 200);
    }
    let last = s.post("/v1/completions", &json!({"prompt": long, "max_tokens": 1})).json();
    assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], 192);
    let metrics = s.get("/metrics");
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    let value = |name: &str| {
        let line =
            metrics.body.lines().find(|l| l.starts_with(&format!("{name} "))).unwrap_or_else(|| panic!("no {name}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(value("gqla:generation_tokens_total"), 10.0, "with the warm-up's");
    assert_eq!((value("gqla:num_requests_running"), value("gqla:kv_cache_usage_perc")), (0.0, 0.0));
    assert_eq!(value("gqla:prefix_cache_hits_total"), 384.0);
    assert_eq!(value("gqla:prompt_tokens_total"), 601.0);
    for times in ["time_to_first_token", "e2e_request_latency", "request_queue_time", "request_time_per_output_token"] {
        // The last has one token, and so no time between tokens.
        let count = if times == "request_time_per_output_token" { 2.0 } else { 3.0 };
        assert_eq!(value(&format!("gqla:{times}_seconds_count")), count, "{times}");
    }
    for name in ["inter_token_latency_seconds_count", "time_per_output_token_seconds_count"] {
        assert_eq!(value(&format!("gqla:{name}")), 6.0, "{name}");
    }
    assert!(value("gqla:step_time_seconds_total") > 0.0 && value("gqla:last_step_seconds") > 0.0);
    assert!(value("gqla:all_reduce_time_seconds_total") < value("gqla:step_time_seconds_total"));
    assert_eq!(value("gqla:num_requests_waiting"), 0.0);
    assert_eq!(value("gqla:e2e_request_latency_seconds_bucket{le=\"+Inf\"}"), 3.0);
    assert!(metrics.body.contains("gqla:info{path=\"") && metrics.body.contains("world_size=\"1\""));
    assert!(metrics.body.contains("gqla:request_success_total{finished_reason=\"length\"} 3"));
    // Every sample belongs to a declared family, and every line is one of Prometheus's forms.
    for line in metrics.body.lines().filter(|l| !l.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|e| name.strip_suffix(e)).unwrap_or(name);
        assert!(metrics.body.contains(&format!("# TYPE {family} ")), "{line}");
    }
    let page = s.get("/");
    assert!(page.body.contains("<html") && !page.body.contains("http://") && !page.body.contains("https://"));
    s.stop();
}

#[test]
fn the_description_names_every_route_and_status() {
    let s = server(|_| {});
    let d = s.get("/openapi.json").json();
    let paths = d["paths"].as_object().unwrap();
    let routes =
        ["/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/tokenize", "/detokenize"];
    for path in routes.iter().chain(&["/", "/health", "/ready", "/metrics", "/openapi.json"]) {
        assert!(paths.contains_key(*path), "{path}");
    }
    assert_eq!(paths.len(), routes.len() + 5);
    // That no route answers with a status that is not described is checked at every request of these tests.
    let statuses = |path: &str| -> Vec<u16> {
        let responses = paths[path]["post"]["responses"].as_object().unwrap();
        responses.keys().map(|s| s.parse().unwrap()).collect()
    };
    for path in ["/v1/completions", "/v1/chat/completions"] {
        assert_eq!(statuses(path), [200, 400, 401, 404, 408, 413, 415, 429, 500, 503]);
    }
    for path in ["/tokenize", "/detokenize"] {
        assert_eq!(statuses(path), [200, 400, 401, 408, 413, 415, 500]);
    }
    s.stop();
}

#[test]
fn a_client_that_leaves_gives_its_blocks_back() {
    let s = server(|_| {});
    let free = s.engine.stats().free_blocks;
    let total: u64 = 1000;
    let mut gone = 0;
    while gone < total {
        let batch: Vec<_> = (0..8)
            .map(|i| {
                let body = complete(json!({"max_tokens": 1500, "stream": i % 2 == 0, "ignore_eos": true}));
                http::send(s.address, "POST", "/v1/completions", &[], Some(body.to_string().as_bytes())).unwrap()
            })
            .collect();
        for (i, mut stream) in batch.into_iter().enumerate() {
            if i % 4 == 0 {
                // Some have begun to read; the rest leave at any moment.
                let mut head = [0; 64];
                assert!(stream.read(&mut head).unwrap() > 0);
            }
            gone += 1;
        }
    }
    until("all is free again", Duration::from_secs(2), || {
        let now = s.engine.stats();
        now.free_blocks == free && now.running + now.waiting == 0
    });
    assert_eq!(s.post("/v1/completions", &complete(json!({}))).status, 200);
    s.stop();
}

#[test]
fn a_reader_that_does_not_read_is_disconnected() {
    let s = server(|_| {});
    // Every token comes with twenty alternatives: far more than the sockets hold.
    let body = json!({"prompt": "x", "max_tokens": 1900, "ignore_eos": true, "stream": true, "logprobs": 20, "n": 8});
    let stream = http::send(s.address, "POST", "/v1/completions", &[], Some(body.to_string().as_bytes())).unwrap();
    until("it is given up", Duration::from_secs(60), || s.engine.stats().cancelled > 0);
    until("nothing is left of it", Duration::from_secs(10), || s.engine.stats().running == 0);
    let r = http::read(stream);
    assert!(r.is_err() || r.is_ok_and(|r| r.cut && !r.body.contains("[DONE]")));
    s.stop();
}

#[test]
fn overload_is_refused_at_once_and_what_is_admitted_finishes() {
    let mut config = model::config("tiny-glm-gqla", None);
    (config.max_sequences, config.max_waiting) = (4, 4);
    let s = Server::start(&model::checkpoint("tiny-glm-gqla").0, config, |_| {});
    let outcomes: Vec<(u16, Option<String>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..80)
            .map(|_| {
                scope.spawn(|| {
                    let r = s.post("/v1/completions", &complete(json!({"max_tokens": 60, "ignore_eos": true})));
                    if r.status == 200 {
                        assert_eq!(r.json()["usage"]["completion_tokens"], 60);
                    }
                    (r.status, r.header("retry-after").map(str::to_string))
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let count = |status: u16| outcomes.iter().filter(|o| o.0 == status).count();
    assert_eq!(count(200) + count(429), 80);
    assert!(count(200) >= 8 && count(429) > 0, "{} admitted", count(200));
    assert!(outcomes.iter().all(|o| (o.0 == 429) == (o.1.as_deref() == Some("1"))));

    // One below the bound there is room for one more, at the bound for none, and one that leaves makes room.
    let long = complete(json!({"max_tokens": 1900, "ignore_eos": true, "stream": true}));
    let submit = || http::send(s.address, "POST", "/v1/completions", &[], Some(long.to_string().as_bytes())).unwrap();
    let mut held: Vec<_> = (0..7).map(|_| submit()).collect();
    let queued = |n: usize| {
        until("they are queued", Duration::from_secs(20), || {
            let now = s.engine.stats();
            now.running + now.waiting == n
        })
    };
    queued(7);
    held.push(submit());
    queued(8);
    refused(&s.post("/v1/completions", &complete(json!({}))), 429, "full");
    held.pop();
    queued(7);
    assert!(s.engine.has_room());
    drop(held);
    queued(0);
    // What would not fit into an empty queue is refused for good.
    assert_eq!(s.post("/v1/completions", &complete(json!({"n": 8}))).status, 200);
    refused(&s.post("/v1/completions", &complete(json!({"n": 9}))), 400, "n: 9");
    s.stop();
}

#[test]
fn an_engine_that_stops_ends_streams_with_an_error_event() {
    let mut config = model::config("tiny-glm-gqla", None);
    config.max_sequences = 1;
    let s = Server::start(&model::checkpoint("tiny-glm-gqla").0, config, |_| {});
    let body = complete(json!({"max_tokens": 1900, "ignore_eos": true, "stream": true}));
    let stream = http::send(s.address, "POST", "/v1/completions", &[], Some(body.to_string().as_bytes())).unwrap();
    until("it runs", Duration::from_secs(10), || s.engine.stats().running == 1);
    until("it streams", Duration::from_secs(10), || s.engine.stats().generated_tokens > 3);
    let waiting = http::send(s.address, "POST", "/v1/completions", &[], Some(body.to_string().as_bytes())).unwrap();
    until("another waits", Duration::from_secs(10), || s.engine.stats().waiting == 1);
    s.engine.shutdown().unwrap();
    // Before its first token the failure is a status of its own.
    let early = http::read(waiting).unwrap();
    refused(&early, 503, "stopped");
    assert_eq!(early.json()["error"]["code"], "engine_stopped");
    let events = http::read(stream).unwrap().events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "engine_stopped", "{last}");
    assert_eq!((s.get("/ready").status, s.get("/health").status), (503, 200));
    refused(&s.post("/v1/completions", &complete(json!({}))), 503, "");
    s.stop();
}

#[test]
fn a_cached_prefix_gives_the_same_bits() {
    let s = server(|_| {});
    let prompt: Vec<u32> = (0..300).map(|i| 4 + i * 7 % 900).collect();
    let ask = || {
        let body = json!({"prompt": prompt, "max_tokens": 16, "temperature": 0.8, "seed": 3, "logprobs": 3});
        let answer = s.post("/v1/completions", &body).json();
        (answer["choices"].clone(), answer["usage"]["prompt_tokens_details"]["cached_tokens"].clone())
    };
    let (first, second) = (ask(), ask());
    assert_eq!((first.1, second.1), (json!(0), json!(256)));
    assert_eq!(first.0, second.0);
    s.stop();
}

#[test]
fn the_engine_knows_nothing_of_http() {
    for file in std::fs::read_dir(model::at("src/engine")).unwrap().flatten() {
        let text = std::fs::read_to_string(file.path()).unwrap();
        for word in ["tokio", "axum", "crate::server", "crate::cli"] {
            assert!(!text.contains(word), "{} names {word}", file.path().display());
        }
    }
    let scheduler = std::fs::read_to_string(model::at("src/engine/scheduler.rs")).unwrap();
    assert!(!scheduler.contains("crate::backend") && !scheduler.contains("crate::comm"));
}

/// What `vllm bench serve --save-result` writes beside the times (vllm/benchmarks/serve.py).
const VLLM_KEYS: [&str; 20] = [
    "date",
    "endpoint_type",
    "backend",
    "label",
    "model_id",
    "tokenizer_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
];

#[test]
fn a_benchmark_drives_the_server() {
    let s = server(|_| {});
    let work = tempfile::tempdir().unwrap();
    let (json, plot) = (work.path().join("r.json"), work.path().join("r.svg"));
    // At even distances 6 at 20 a second take a quarter of a second at least; at random they have a burstiness.
    let even = std::process::Command::new(env!("CARGO_BIN_EXE_gqla"))
        .args(["bench", "serve", "--arrival", "fixed", "--rate", "20", "--requests", "6", "--max-tokens", "2", "--url"])
        .arg(format!("http://{}", s.address))
        .output()
        .unwrap();
    let even: Value = serde_json::from_slice(&even.stdout).unwrap();
    assert!(even["duration"].as_f64().unwrap() >= 0.25 && even["burstiness"].is_null(), "{even}");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_gqla"));
    command.args([
        "bench",
        "serve",
        "--rate",
        "50,inf",
        "--requests",
        "8",
        "--prompt-tokens",
        "20",
        "--max-tokens",
        "9",
    ]);
    command.arg("--url").arg(format!("http://{}", s.address)).arg("--json").arg(&json).arg("--plot").arg(&plot);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let runs: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!((runs.len(), &runs[1]["request_rate"]), (2, &json!("inf")));
    for r in runs {
        for key in VLLM_KEYS {
            assert!(r.get(key).is_some(), "no {key}: {r}");
        }
        assert_eq!(r["burstiness"], 1.0);
        assert!(r["max_output_tokens_per_s"].as_f64() >= r["output_throughput"].as_f64().map(|t| t.min(9.0)));
        assert_eq!(
            (&r["completed"], &r["total_output_tokens"], &r["model_id"]),
            (&json!(8), &json!(72), &json!("tiny"))
        );
        for figure in ["ttft", "tpot", "itl", "e2el"] {
            for kind in ["mean", "median", "p99"] {
                assert!(r[format!("{kind}_{figure}_ms")].as_f64().unwrap() > 0.0, "{kind} {figure}: {r}");
            }
            assert!(r[format!("std_{figure}_ms")].is_number());
        }
    }
    let picture = std::fs::read_to_string(&plot).unwrap();
    assert!(picture.contains("<svg") && picture.contains("p99") && picture.matches("<polyline").count() >= 3);
    s.stop();
}

#[test]
fn a_chat_in_the_terminal_remembers() {
    let model = http::with_template(&model::checkpoint("tiny-glm-gqla").0, http::TEMPLATE);
    let chat = |lines: &str| {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_gqla"))
            .args(["chat", "--temperature", "0", "--max-tokens", "8", "--model"])
            .arg(model.path())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let alone = chat("def f(x):\n");
    assert!(!alone.trim().is_empty());
    assert_eq!(chat("def f(x):\n/reset\n\ndef f(x):\n/exit\nnever\n"), alone.repeat(2));
    assert_ne!(chat("def f(x):\ndef f(x):\n"), alone.repeat(2), "the second answer does not know of the first");
}
