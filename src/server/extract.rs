//! A request's JSON body, bounded in size and time, refused in OpenAI's words.

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;

use super::{ApiError, Shared};

/// A body of JSON.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Shared> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, server: &Shared) -> Result<Json<T>, ApiError> {
        let media = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
        let media = media.split(';').next().unwrap_or("").trim();
        if !media.eq_ignore_ascii_case("application/json") {
            let what = format!("the body is {media:?}: send application/json");
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, what));
        }
        let bytes = read(request, server).await?;
        serde_json::from_slice(&bytes).map(Json).map_err(|e| {
            ApiError::new(StatusCode::BAD_REQUEST, format!("the body does not fit: {e}")).code("invalid_json")
        })
    }
}

async fn read(request: Request<Body>, server: &Shared) -> Result<axum::body::Bytes, ApiError> {
    let most = server.limits.body;
    let too_large = || {
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is larger than {most} bytes"))
            .code("body_too_large")
    };
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|l| l > most as u64) {
        return Err(too_large());
    }
    let body = axum::body::to_bytes(request.into_body(), most);
    match tokio::time::timeout(server.limits.body_time, body).await {
        Ok(Ok(bytes)) => Ok(bytes),
        // The body is cut off by the bound, or by its sender, who then does not read this.
        Ok(Err(_)) => Err(too_large()),
        Err(_) => Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive")),
    }
}
