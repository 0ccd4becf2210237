//! Requests and responses, as OpenAI's API names them, with vLLM's names for what OpenAI has not.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// One or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    /// As a list.
    pub fn list(&self) -> &[String] {
        match self {
            OneOrMany::One(one) => std::slice::from_ref(one),
            OneOrMany::Many(many) => many,
        }
    }
}

/// What to continue: a text, texts, a token list, or token lists.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Texts, each with its own choices.
    Texts(Vec<String>),
    /// Token ids.
    Ids(Vec<u32>),
    /// Lists of token ids.
    IdLists(Vec<Vec<u32>>),
}

/// What is streamed beside the text.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    pub include_usage: Option<bool>,
}

/// What both kinds of completion know.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct Common {
    /// The model's name, as `/v1/models` lists it.
    pub model: Option<String>,
    /// 0 always takes the most probable token. Default 1.
    #[schema(minimum = 0, maximum = 100)]
    pub temperature: Option<f32>,
    /// Draw among the most probable tokens that sum to this. Default 1.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Draw among this many of the most probable; 0 and -1 are all.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Draw among those at least this fraction as probable as the best.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// Above 1, tokens of prompt and text become less likely.
    #[schema(minimum = 0.01, maximum = 100)]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens in the text so far.
    #[schema(minimum = -100, maximum = 100)]
    pub presence_penalty: Option<f32>,
    /// The same, times their count.
    #[schema(minimum = -100, maximum = 100)]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of single tokens, by id.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// The same seed and request give the same text. Choice `i` has its own draws.
    pub seed: Option<i64>,
    /// Texts that end the generation; they are not part of it.
    pub stop: Option<OneOrMany>,
    /// Token ids that end it.
    pub stop_token_ids: Option<Vec<u32>>,
    /// Go on past the model's end of sequence.
    pub ignore_eos: Option<bool>,
    /// No end before this many tokens.
    #[schema(minimum = 0)]
    pub min_tokens: Option<usize>,
    /// Choices of each prompt. Default 1.
    #[schema(minimum = 1)]
    pub n: Option<usize>,
    /// Send the text as it comes, as server-sent events.
    pub stream: Option<bool>,
    /// What is streamed beside it.
    pub stream_options: Option<StreamOptions>,
    /// The prompt's log-probabilities with this many alternatives (not with `stream`).
    #[schema(minimum = 0)]
    pub prompt_logprobs: Option<usize>,
}

/// `POST /v1/completions`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct CompletionRequest {
    /// What to continue.
    pub prompt: Prompt,
    #[serde(flatten)]
    #[schema(inline)]
    #[allow(missing_docs)]
    pub common: Common,
    /// Tokens to generate at most. Default 16.
    #[schema(minimum = 0)]
    pub max_tokens: Option<usize>,
    /// The tokens' log-probabilities with this many alternatives.
    #[schema(minimum = 0)]
    pub logprobs: Option<usize>,
    /// The prompt before the text.
    pub echo: Option<bool>,
    /// Only `n` itself: choices are not ranked.
    #[schema(minimum = 1)]
    pub best_of: Option<usize>,
    /// Not served.
    pub suffix: Option<String>,
    /// Put the model's special tokens before a text. Default true.
    pub add_special_tokens: Option<bool>,
}

/// A chat message's content.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    /// A text.
    Text(String),
    /// Parts, all of them text.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct Part {
    /// `text`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text.
    pub text: Option<String>,
}

/// A chat message.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the checkpoint's template knows.
    pub role: String,
    /// What is said.
    pub content: Option<Content>,
    /// Who says it.
    pub name: Option<String>,
}

/// The wanted form of the answer.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct ResponseFormat {
    /// `text`.
    #[serde(rename = "type")]
    pub kind: String,
}

/// `POST /v1/chat/completions`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// The conversation.
    pub messages: Vec<Message>,
    #[serde(flatten)]
    #[schema(inline)]
    #[allow(missing_docs)]
    pub common: Common,
    /// Tokens to generate at most. Default: what the context leaves.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<usize>,
    /// Its older name.
    #[schema(minimum = 1)]
    pub max_tokens: Option<usize>,
    /// Report log-probabilities.
    pub logprobs: Option<bool>,
    /// With this many alternatives.
    #[schema(minimum = 0)]
    pub top_logprobs: Option<usize>,
    /// Let the template begin the assistant's turn. Default true.
    pub add_generation_prompt: Option<bool>,
    /// More variables for the template.
    pub chat_template_kwargs: Option<BTreeMap<String, Value>>,
    /// Only `{"type": "text"}`.
    pub response_format: Option<ResponseFormat>,
    /// Not served.
    pub tools: Option<Vec<Value>>,
}

/// What was computed.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// Of the prompts' tokens.
    pub prompt_tokens_details: PromptDetails,
}

/// Of the prompts' tokens.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub struct PromptDetails {
    /// Those found in the cache.
    pub cached_tokens: usize,
}

/// A completion, or a chunk of one.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Completion {
    /// The request's id.
    pub id: String,
    /// `text_completion`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model.
    pub model: String,
    /// The choices.
    pub choices: Vec<CompletionChoice>,
    /// What was computed.
    pub usage: Option<Usage>,
}

/// A choice.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Its number: prompts in order, each with its choices.
    pub index: usize,
    /// The text, or the next part of it.
    pub text: String,
    /// Its tokens' log-probabilities.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop`, `length`, or nothing yet.
    pub finish_reason: Option<&'static str>,
    /// The prompt's log-probabilities, when asked for: by token id.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Value>>)]
    pub prompt_logprobs: Option<Value>,
}

/// Log-probabilities of a text's tokens, one entry a token in every list.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// The tokens' texts.
    pub tokens: Vec<String>,
    /// Their log-probabilities; the first of an echoed prompt has none.
    pub token_logprobs: Vec<Option<f32>>,
    /// The most probable tokens there.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where each begins in the text, in characters.
    pub text_offset: Vec<usize>,
}

/// A chat completion.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// The request's id.
    pub id: String,
    /// `chat.completion`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model.
    pub model: String,
    /// The choices.
    pub choices: Vec<ChatChoice>,
    /// What was computed.
    pub usage: Usage,
}

/// A choice.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Its number.
    pub index: usize,
    /// What the assistant says.
    pub message: Answer,
    /// Its tokens' log-probabilities.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: Option<&'static str>,
    /// The prompt's log-probabilities, when asked for: by token id.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Value>>)]
    pub prompt_logprobs: Option<Value>,
}

/// What the assistant says.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Answer {
    /// `assistant`.
    pub role: &'static str,
    /// The text.
    pub content: String,
    /// Always none.
    pub refusal: Option<String>,
}

/// A part of a chat completion.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatChunk {
    /// The request's id.
    pub id: String,
    /// `chat.completion.chunk`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model.
    pub model: String,
    /// The choices that go on.
    pub choices: Vec<ChunkChoice>,
    /// What was computed; in the last chunk, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// A choice's next part.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChunkChoice {
    /// Its number.
    pub index: usize,
    /// What is new.
    pub delta: Delta,
    /// Its tokens' log-probabilities.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length`, or nothing yet.
    pub finish_reason: Option<&'static str>,
}

/// What is new.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Delta {
    /// `assistant`, at first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// The text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Log-probabilities of an answer's tokens.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One entry a token.
    pub content: Vec<ChatLogprob>,
}

/// A token's log-probability.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatLogprob {
    /// Its text.
    pub token: String,
    /// Its log-probability.
    pub logprob: f32,
    /// Its text's bytes.
    pub bytes: Vec<u8>,
    /// The most probable tokens there.
    pub top_logprobs: Vec<TopLogprob>,
}

/// An alternative.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// Its log-probability.
    pub logprob: f32,
    /// Its text's bytes.
    pub bytes: Vec<u8>,
}

/// `GET /v1/models`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Models {
    /// `list`.
    pub object: &'static str,
    /// The one model.
    pub data: Vec<ModelCard>,
}

/// The model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelCard {
    /// Its name.
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// When the server started, in seconds since 1970.
    pub created: u64,
    /// `gqla`.
    pub owned_by: &'static str,
    /// Tokens of the longest context.
    pub max_model_len: usize,
}

/// `POST /tokenize`: a prompt, or messages as the chat template writes them.
#[derive(Debug, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    /// The text.
    pub prompt: Option<String>,
    /// The conversation.
    pub messages: Option<Vec<Message>>,
    /// Put the model's special tokens before the text. Default true.
    pub add_special_tokens: Option<bool>,
    /// Let the template begin the assistant's turn. Default true.
    pub add_generation_prompt: Option<bool>,
}

/// The tokens of a text.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tokenized {
    /// How many.
    pub count: usize,
    /// Tokens of the longest context.
    pub max_model_len: usize,
    /// Their ids.
    pub tokens: Vec<u32>,
}

/// `POST /detokenize`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct DetokenizeRequest {
    /// Token ids.
    pub tokens: Vec<u32>,
}

/// The text of tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct Detokenized {
    /// The text.
    pub prompt: String,
}

/// `/health` and `/ready`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    /// `ok`.
    pub status: &'static str,
}
