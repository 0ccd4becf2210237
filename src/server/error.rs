//! Errors as OpenAI writes them.

use axum::body::Body;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::Refused;
use crate::error::Error;

/// An error response.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorDetail,
}

/// The body of every error.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// In words, with the remedy.
    pub message: String,
    /// The kind of error.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The field at fault.
    pub param: Option<&'static str>,
    /// For programs.
    pub code: Option<&'static str>,
}

impl ApiError {
    /// An error of `status`, with OpenAI's word for its kind.
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        let kind = match status.as_u16() {
            401 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            503 => "service_unavailable_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        ApiError { status, body: ErrorDetail { message: message.into(), kind, param: None, code: None } }
    }

    /// 400 about a field.
    pub fn field(param: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, message).about(param)
    }

    /// Names the field.
    pub fn about(mut self, param: &'static str) -> ApiError {
        self.body.param = Some(param);
        self
    }

    /// Adds the code for programs.
    pub fn code(mut self, code: &'static str) -> ApiError {
        self.body.code = Some(code);
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The body, as an event after the response has begun carries it too.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { error: self.body.clone() }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> ApiError {
        match refused {
            Refused::Full => ApiError::new(StatusCode::TOO_MANY_REQUESTS, "the queue is full: try again in a second")
                .code("queue_full"),
            Refused::Draining => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down").code("shutting_down")
            }
            Refused::Invalid(e) => e.into(),
            Refused::Stopped(e) => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, e.to_string()).code("engine_stopped"),
        }
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        let text = error.to_string();
        match error {
            Error::Request(_) if text.contains("context") => {
                ApiError::new(StatusCode::BAD_REQUEST, text).code("context_length_exceeded")
            }
            Error::Request(_) | Error::Usage(_) => ApiError::new(StatusCode::BAD_REQUEST, text),
            Error::Stopped(_) | Error::Rank { .. } => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, text).code("engine_stopped")
            }
            _ => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, text),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self.body()).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => {
                headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
            }
            // A browser asks for the key then, as a password.
            StatusCode::UNAUTHORIZED => {
                let ask = header::HeaderValue::from_static("Basic realm=\"gqla: the API key is the password\"");
                headers.insert(header::WWW_AUTHENTICATE, ask);
            }
            _ => {}
        }
        response
    }
}

/// No such route.
pub async fn not_found(uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is nothing at {}", uri.path())).code("unknown_url")
}

/// The route has other methods; the router adds which.
pub async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not allowed at {}", uri.path()))
}

/// A handler panicked: a defect, told as one.
pub fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error: a handler panicked; please report it")
        .into_response()
}
