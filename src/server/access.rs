//! What happens around every request: the key, the count, the log line.

use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use super::{ApiError, Shared};

/// Checks the key, runs the handler, counts and logs.
pub async fn guard(State(server): State<Shared>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let free = path == "/health" || server.key.as_deref().is_none_or(|key| has_key(request.headers(), key));
    let response = if free {
        next.run(request).await
    } else {
        let what = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'";
        ApiError::new(StatusCode::UNAUTHORIZED, what).code("invalid_api_key").into_response()
    };
    let (status, took) = (response.status().as_u16(), began.elapsed());
    server.metrics.responded(status);
    if server.access_log {
        let ms = took.as_micros() as f64 / 1e3;
        tracing::info!(target: "gqla::access", %method, path, status, ms, "request");
    }
    response
}

/// Whether the request carries the key, as a bearer token or as a Basic password. The comparison takes the same time
/// wherever they differ.
fn has_key(headers: &HeaderMap, key: &str) -> bool {
    let Some(value) = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()) else { return false };
    let Some((scheme, credentials)) = value.split_once(' ') else { return false };
    let given = if scheme.eq_ignore_ascii_case("bearer") {
        credentials.trim().as_bytes().to_vec()
    } else if scheme.eq_ignore_ascii_case("basic") {
        let Some(pair) = base64(credentials.trim()) else { return false };
        let Some(colon) = pair.iter().position(|b| *b == b':') else { return false };
        pair[colon + 1..].to_vec()
    } else {
        return false;
    };
    // Digests have one length, so that the key's own does not show either.
    let digest = |bytes: &[u8]| <sha2::Sha256 as sha2::Digest>::digest(bytes);
    digest(&given).ct_eq(&digest(key.as_bytes())).into()
}

/// Decodes standard base64.
fn base64(text: &str) -> Option<Vec<u8>> {
    let (mut out, mut bits, mut count) = (vec![], 0u32, 0);
    for b in text.trim_end_matches('=').bytes() {
        let value = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        (bits, count) = (bits << 6 | u32::from(value), count + 6);
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn only_the_key_opens() {
        for good in ["Bearer secret", "bearer secret", "Basic dXNlcjpzZWNyZXQ=", "Basic OnNlY3JldA=="] {
            assert!(has_key(&headers(good), "secret"), "{good}");
        }
        for bad in ["Bearer secre", "Bearer secrets", "secret", "Bearer", "Basic secret", "Basic dXNlcg==", "Digest x"]
        {
            assert!(!has_key(&headers(bad), "secret"), "{bad}");
        }
        assert!(!has_key(&HeaderMap::new(), "secret"));
    }
}
