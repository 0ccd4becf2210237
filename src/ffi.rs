//! The engine for C: opaque handles, status codes, and a message of the last error on each thread.
//!
//! Nothing unwinds across this border: a panic is `GQLA_STATUS_DEFECT`. A handle may be used from any thread, one call
//! at a time for a stream; engines take calls from many threads at once. `include/gqla.h` is generated from this file.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::engine::{Config, Engine, Event, Reason, Refused, Request, Sampling, TokenStream};
use crate::error::Error;
use crate::model::shard::Path;
use crate::text::Tokenizer;

/// What came of a call. Up to 130 the numbers are the command's exit codes.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GqlaStatus {
    /// Done.
    Ok = 0,
    /// A defect of the library.
    Defect = 1,
    /// An argument cannot be used as given, or a request cannot be served as asked.
    Invalid = 2,
    /// The checkpoint or another file: missing, damaged or unsupported.
    File = 3,
    /// The number of ranks does not fit the model and the path.
    Sharding = 4,
    /// Too little memory.
    Memory = 5,
    /// A rank was lost, or the engine has stopped.
    Stopped = 6,
    /// The device, its driver or one of its libraries.
    Device = 7,
    /// The queue is full: try again later.
    Full = 20,
    /// The engine is finishing and takes nothing new.
    Draining = 21,
    /// Nothing has come within the time given.
    Timeout = 22,
    /// The stream has ended: its last event has been given.
    End = 23,
    /// The buffer given is too small; the length needed has been written.
    TooSmall = 24,
}

/// A running engine.
pub struct GqlaEngine {
    engine: Engine,
    tokenizer: Option<Tokenizer>,
}

/// The events of one request.
pub struct GqlaStream {
    stream: Option<TokenStream>,
}

/// The decoding path.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GqlaPath {
    /// The cost model's choice.
    Auto = 0,
    /// Cache the keys and values of groups.
    Gqa = 1,
    /// Cache the latent.
    Absorb = 2,
}

/// How to start an engine. `gqla_options_default` fills it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct GqlaOptions {
    /// Ranks, as threads of this process.
    pub ranks: u32,
    /// The decoding path.
    pub path: i32,
    /// Sequences in a step at most.
    pub max_sequences: u32,
    /// Requests that wait beside those.
    pub max_waiting: u32,
    /// Tokens a step computes at most.
    pub step_tokens: u32,
    /// Tokens the cache holds; 0 takes what memory allows.
    pub cache_tokens: u64,
    /// Threads of a rank; 0 shares the host's cores.
    pub threads: u32,
}

/// How to continue a prompt. `gqla_sampling_default` fills it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct GqlaSampling {
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// 0 always takes the most probable token.
    pub temperature: f32,
    /// Draw among the most probable tokens that sum to this.
    pub top_p: f32,
    /// Draw among this many of the most probable; 0 is all.
    pub top_k: u32,
    /// The same seed and prompt give the same tokens; used when `has_seed` is not 0.
    pub seed: u64,
    /// Whether `seed` is given.
    pub has_seed: u8,
    /// Not 0: go on past the model's end of sequence.
    pub ignore_eos: u8,
    /// Not 0: report each token's log-probability.
    pub logprobs: u8,
}

/// What an event is.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GqlaEventKind {
    /// A token.
    Token = 0,
    /// The last event: a stop token or the model's end of sequence.
    Stop = 1,
    /// The last event: `max_tokens`.
    Length = 2,
    /// The last event: the engine failed; `gqla_last_error` says why.
    Failed = 3,
}

/// An event of a stream.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct GqlaEvent {
    /// What it is.
    pub kind: GqlaEventKind,
    /// The token.
    pub token: u32,
    /// Its log-probability, when asked for.
    pub logprob: f32,
    /// In a last event: tokens of the prompt.
    pub prompt_tokens: u64,
    /// In a last event: those of them found in the cache.
    pub cached_tokens: u64,
    /// In a last event: tokens generated.
    pub tokens: u64,
}

/// The engine's counts.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct GqlaStats {
    /// Sequences in steps.
    pub running: u64,
    /// Sequences waiting.
    pub waiting: u64,
    /// Cache blocks free.
    pub free_blocks: u64,
    /// Cache blocks in all.
    pub total_blocks: u64,
    /// Steps computed.
    pub steps: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Requests ended well.
    pub finished: u64,
    /// Requests failed.
    pub failed: u64,
    /// Requests cancelled.
    pub cancelled: u64,
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

type Outcome = Result<(), (GqlaStatus, String)>;

fn note(text: &str) {
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    LAST.with(|last| *last.borrow_mut() = text);
}

/// Runs `body`; an error's message becomes the thread's last.
fn guarded(body: impl FnOnce() -> Outcome) -> GqlaStatus {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => GqlaStatus::Ok,
        Ok(Err((status, text))) => {
            note(&text);
            status
        }
        Err(_) => {
            note("internal error: a panic; please report it");
            GqlaStatus::Defect
        }
    }
}

fn failed(error: Error) -> (GqlaStatus, String) {
    let status = match error.exit_code() {
        2 => GqlaStatus::Invalid,
        3 => GqlaStatus::File,
        4 => GqlaStatus::Sharding,
        5 => GqlaStatus::Memory,
        6 | 130 => GqlaStatus::Stopped,
        7 => GqlaStatus::Device,
        _ => GqlaStatus::Defect,
    };
    (status, error.to_string())
}

fn invalid(what: &str) -> (GqlaStatus, String) {
    (GqlaStatus::Invalid, what.to_string())
}

/// A pointer's target.
///
/// # Safety
/// `pointer` is null or points to a live `T` that nothing changes during the call.
unsafe fn target<'a, T>(pointer: *const T, what: &str) -> Result<&'a T, (GqlaStatus, String)> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }.ok_or_else(|| invalid(&format!("{what} is NULL")))
}

/// The same, to be written.
///
/// # Safety
/// `pointer` is null or points to a live `T` that nothing else uses during the call.
unsafe fn target_mut<'a, T>(pointer: *mut T, what: &str) -> Result<&'a mut T, (GqlaStatus, String)> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_mut() }.ok_or_else(|| invalid(&format!("{what} is NULL")))
}

/// `length` elements.
///
/// # Safety
/// `pointer` points to `length` live elements, or `length` is 0.
unsafe fn slice<'a, T>(pointer: *const T, length: usize, what: &str) -> Result<&'a [T], (GqlaStatus, String)> {
    if length == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() {
        return Err(invalid(&format!("{what} is NULL")));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(pointer, length) })
}

/// A text.
///
/// # Safety
/// `pointer` is null or a text that ends in 0.
unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Result<&'a str, (GqlaStatus, String)> {
    if pointer.is_null() {
        return Err(invalid(&format!("{what} is NULL")));
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(pointer) }.to_str().map_err(|_| invalid(&format!("{what} is not UTF-8")))
}

/// The library's version, as "1.2.3".
#[unsafe(no_mangle)]
pub extern "C" fn gqla_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"unknown",
    };
    VERSION.as_ptr()
}

/// What the last failed call on this thread has to say; valid until the thread's next failed call.
#[unsafe(no_mangle)]
pub extern "C" fn gqla_last_error() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}

/// Fills `options` with the defaults: one rank.
///
/// # Safety
/// `options` is NULL or points to a `GqlaOptions`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_options_default(options: *mut GqlaOptions) -> GqlaStatus {
    guarded(|| {
        let defaults = Config::new("");
        // SAFETY: as this function's own.
        *unsafe { target_mut(options, "options") }? = GqlaOptions {
            ranks: 1,
            path: GqlaPath::Auto as i32,
            max_sequences: defaults.max_sequences as u32,
            max_waiting: defaults.max_waiting as u32,
            step_tokens: defaults.step_tokens as u32,
            cache_tokens: 0,
            threads: 0,
        };
        Ok(())
    })
}

/// Fills `sampling` with the defaults: 16 tokens, greedy.
///
/// # Safety
/// `sampling` is NULL or points to a `GqlaSampling`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_sampling_default(sampling: *mut GqlaSampling) -> GqlaStatus {
    guarded(|| {
        // SAFETY: as this function's own.
        *unsafe { target_mut(sampling, "sampling") }? = GqlaSampling {
            max_tokens: 16,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            has_seed: 0,
            ignore_eos: 0,
            logprobs: 0,
        };
        Ok(())
    })
}

/// Loads the checkpoint in the directory `model` and starts an engine. `options` may be NULL for the defaults. The
/// engine is freed by `gqla_free`.
///
/// # Safety
/// `model` is a text that ends in 0; `options` is NULL or points to options; `engine` points to where the handle goes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_start(
    model: *const c_char,
    options: *const GqlaOptions,
    engine: *mut *mut GqlaEngine,
) -> GqlaStatus {
    guarded(|| {
        // SAFETY: as this function's own, for all three.
        let (model, options, out) = unsafe { (text(model, "model")?, options.as_ref(), target_mut(engine, "engine")?) };
        *out = std::ptr::null_mut();
        let mut config = Config::new(model);
        let mut ranks = 1;
        if let Some(o) = options {
            if o.ranks == 0 || o.max_sequences == 0 || o.step_tokens == 0 {
                return Err(invalid("options: ranks, max_sequences and step_tokens must be above 0"));
            }
            ranks = o.ranks as usize;
            config.path = match o.path {
                0 => None,
                1 => Some(Path::Gqa),
                2 => Some(Path::Absorb),
                _ => return Err(invalid("options: path must be 0, 1 or 2")),
            };
            config.max_sequences = o.max_sequences as usize;
            config.max_waiting = o.max_waiting as usize;
            config.step_tokens = o.step_tokens as usize;
            config.cache_tokens = (o.cache_tokens > 0).then_some(o.cache_tokens as usize);
            config.threads = (o.threads > 0).then_some(o.threads as usize);
        }
        let started = Engine::start_threads(config, ranks).map_err(failed)?;
        // Token ids need no tokenizer: its absence is told by the calls that do.
        let tokenizer = Tokenizer::load(model.as_ref(), &started.info().model).ok();
        *out = Box::into_raw(Box::new(GqlaEngine { engine: started, tokenizer }));
        Ok(())
    })
}

/// Queues a prompt of `length` token ids. `sampling` may be NULL for the defaults. The stream is freed by
/// `gqla_stream_free`. `GQLA_STATUS_FULL`: try again later.
///
/// # Safety
/// `engine` is a live engine; `prompt` points to `length` ids; `sampling` is NULL or points to one; `stream` points to
/// where the handle goes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_submit(
    engine: *const GqlaEngine,
    prompt: *const u32,
    length: usize,
    sampling: *const GqlaSampling,
    stream: *mut *mut GqlaStream,
) -> GqlaStatus {
    guarded(|| {
        // SAFETY: as this function's own, for all four.
        let (engine, prompt, sampling, out) = unsafe {
            let prompt = slice(prompt, length, "prompt")?;
            (target(engine, "engine")?, prompt, sampling.as_ref(), target_mut(stream, "stream")?)
        };
        *out = std::ptr::null_mut();
        let mut request = Request { prompt: prompt.to_vec(), ..Request::default() };
        if let Some(s) = sampling {
            request.max_tokens = s.max_tokens as usize;
            request.ignore_eos = s.ignore_eos != 0;
            request.logprobs = (s.logprobs != 0).then_some(0);
            request.sampling = Sampling {
                temperature: s.temperature,
                top_p: s.top_p,
                top_k: s.top_k as usize,
                seed: (s.has_seed != 0).then_some(s.seed),
                ..Sampling::default()
            };
        }
        let submitted = engine.engine.try_submit(request).map_err(|refused| match refused {
            Refused::Full => (GqlaStatus::Full, refused.to_string()),
            Refused::Draining => (GqlaStatus::Draining, refused.to_string()),
            Refused::Invalid(e) => failed(e),
            Refused::Stopped(e) => (GqlaStatus::Stopped, e.to_string()),
        })?;
        *out = Box::into_raw(Box::new(GqlaStream { stream: Some(submitted) }));
        Ok(())
    })
}

/// The stream's next event, waiting at most `milliseconds` for it: `GQLA_STATUS_TIMEOUT` when none has come,
/// `GQLA_STATUS_END` after the last one and after `gqla_cancel`.
///
/// # Safety
/// `stream` is a live stream that no other call uses; `event` points to where the event goes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_poll(stream: *mut GqlaStream, milliseconds: u64, event: *mut GqlaEvent) -> GqlaStatus {
    guarded(|| {
        // SAFETY: as this function's own, for both.
        let (stream, out) = unsafe { (target_mut(stream, "stream")?, target_mut(event, "event")?) };
        let ended = || (GqlaStatus::End, "the stream has ended".to_string());
        let Some(live) = &mut stream.stream else { return Err(ended()) };
        let mut told = GqlaEvent {
            kind: GqlaEventKind::Token,
            token: 0,
            logprob: 0.0,
            prompt_tokens: 0,
            cached_tokens: 0,
            tokens: 0,
        };
        match live.next_timeout(Duration::from_millis(milliseconds)) {
            (Some(Event::Token(token)), _) => {
                told.token = token.id;
                told.logprob = token.logprob.map_or(0.0, |l| l.logprob);
            }
            (Some(Event::Finished(f)), _) => {
                told.kind = if f.reason == Reason::Stop { GqlaEventKind::Stop } else { GqlaEventKind::Length };
                (told.prompt_tokens, told.cached_tokens) = (f.prompt_tokens as u64, f.cached_tokens as u64);
                told.tokens = f.tokens as u64;
            }
            (Some(Event::Failed(error)), _) => {
                note(&error.to_string());
                told.kind = GqlaEventKind::Failed;
            }
            // Not asked for here.
            (Some(Event::Prompt(_)), _) => return Err((GqlaStatus::Timeout, "nothing has come yet".into())),
            (None, true) => return Err(ended()),
            (None, false) => return Err((GqlaStatus::Timeout, "nothing has come yet".into())),
        }
        *out = told;
        Ok(())
    })
}

/// Cancels a stream: its blocks are free again, and it gives no more events. Twice is fine, NULL too.
///
/// # Safety
/// `stream` is NULL or a live stream that no other call uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_cancel(stream: *mut GqlaStream) -> GqlaStatus {
    guarded(|| {
        // SAFETY: as this function's own.
        if let Some(stream) = unsafe { stream.as_mut() } {
            stream.stream = None;
        }
        Ok(())
    })
}

/// Frees a stream, cancelling it if it has not ended. NULL is fine.
///
/// # Safety
/// `stream` is NULL or a live stream, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_stream_free(stream: *mut GqlaStream) {
    guarded(|| {
        if !stream.is_null() {
            // SAFETY: it was made by Box::into_raw in gqla_submit and is given back once.
            drop(unsafe { Box::from_raw(stream) });
        }
        Ok(())
    });
}

/// The token ids of a text, into `ids`. `*length` is the room there, and becomes the number of ids;
/// `GQLA_STATUS_TOO_SMALL` when there are more than there is room for.
///
/// # Safety
/// `engine` is a live engine; `input` is a text that ends in 0; `ids` points to `*length` ids, or is NULL where that
/// is 0; `length` points to a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_encode(
    engine: *const GqlaEngine,
    input: *const c_char,
    ids: *mut u32,
    length: *mut usize,
) -> GqlaStatus {
    guarded(|| {
        // SAFETY: as this function's own, for all three.
        let (engine, input, length) =
            unsafe { (target(engine, "engine")?, text(input, "input")?, target_mut(length, "length")?) };
        let encoded = tokenizer(engine)?.encode(input).map_err(failed)?;
        // SAFETY: `ids` has room for `length`, and is another array than `encoded`.
        unsafe { give(&encoded, ids, length) }
    })
}

/// The text of `count` token ids, as UTF-8 without a final 0, into `output`. `*length` is the room there, and becomes
/// the number of bytes; `GQLA_STATUS_TOO_SMALL` when there are more than there is room for.
///
/// # Safety
/// `engine` is a live engine; `ids` points to `count` ids; `output` points to `*length` bytes, or is NULL where that
/// is 0; `length` points to a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_decode(
    engine: *const GqlaEngine,
    ids: *const u32,
    count: usize,
    output: *mut c_char,
    length: *mut usize,
) -> GqlaStatus {
    guarded(|| {
        // SAFETY: as this function's own, for all three.
        let (engine, ids, length) =
            unsafe { (target(engine, "engine")?, slice(ids, count, "ids")?, target_mut(length, "length")?) };
        let decoded = tokenizer(engine)?.decode(ids).map_err(failed)?;
        // SAFETY: `output` has room for `length`, and is another array than `decoded`.
        unsafe { give(decoded.as_bytes(), output.cast(), length) }
    })
}

fn tokenizer(engine: &GqlaEngine) -> Result<&Tokenizer, (GqlaStatus, String)> {
    engine.tokenizer.as_ref().ok_or_else(|| (GqlaStatus::File, "the checkpoint has no readable tokenizer".into()))
}

/// Copies `from` to `to`, where there is room for `length`.
///
/// # Safety
/// `to` points to `length` elements that are not `from`'s, or `length` is 0.
unsafe fn give<T: Copy>(from: &[T], to: *mut T, length: &mut usize) -> Outcome {
    let room = std::mem::replace(length, from.len());
    if from.len() > room {
        return Err((GqlaStatus::TooSmall, format!("there is room for {room} and {} are needed", from.len())));
    }
    if !from.is_empty() {
        // SAFETY: the caller's promise, and `from` fits.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }
    Ok(())
}

/// The engine's counts.
///
/// # Safety
/// `engine` is a live engine; `stats` points to where the counts go.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_stats(engine: *const GqlaEngine, stats: *mut GqlaStats) -> GqlaStatus {
    guarded(|| {
        // SAFETY: as this function's own, for both.
        let (engine, out) = unsafe { (target(engine, "engine")?, target_mut(stats, "stats")?) };
        let s = engine.engine.stats();
        *out = GqlaStats {
            running: s.running as u64,
            waiting: s.waiting as u64,
            free_blocks: s.free_blocks as u64,
            total_blocks: s.total_blocks as u64,
            steps: s.steps,
            generated_tokens: s.generated_tokens,
            finished: s.finished,
            failed: s.failed,
            cancelled: s.cancelled,
        };
        Ok(())
    })
}

/// Takes nothing new, finishes what runs for at most `milliseconds`, then stops. Twice is fine.
///
/// # Safety
/// `engine` is a live engine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_drain(engine: *const GqlaEngine, milliseconds: u64) -> GqlaStatus {
    guarded(|| {
        // SAFETY: as this function's own.
        let engine = unsafe { target(engine, "engine") }?;
        engine.engine.drain(Duration::from_millis(milliseconds)).map_err(failed)
    })
}

/// Stops at once; streams that run fail. Twice is fine.
///
/// # Safety
/// `engine` is a live engine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_shutdown(engine: *const GqlaEngine) -> GqlaStatus {
    // SAFETY: as this function's own.
    unsafe { gqla_drain(engine, 0) }
}

/// Stops and frees an engine. Its streams may be freed before or after. NULL is fine.
///
/// # Safety
/// `engine` is NULL or a live engine that no other call uses, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gqla_free(engine: *mut GqlaEngine) {
    guarded(|| {
        if !engine.is_null() {
            // SAFETY: it was made by Box::into_raw in gqla_start and is given back once.
            let engine = unsafe { Box::from_raw(engine) };
            engine.engine.shutdown().map_err(failed)?;
        }
        Ok(())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_status_and_does_not_unwind() {
        assert_eq!(guarded(|| panic!("a defect")), GqlaStatus::Defect);
        // SAFETY: the library's own text, which lives until the next failed call of this thread.
        let last = unsafe { CStr::from_ptr(gqla_last_error()) };
        assert!(last.to_str().is_ok_and(|text| text.contains("panic")));
    }
}
