/* The C interface of gqla. Generated from src/ffi.rs: GQLA_WRITE_HEADER=1 cargo test --test ffi */

#ifndef GQLA_H
#define GQLA_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

// What came of a call. Up to 130 the numbers are the command's exit codes.
enum GqlaStatus
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Done.
  GQLA_STATUS_OK = 0,
  // A defect of the library.
  GQLA_STATUS_DEFECT = 1,
  // An argument cannot be used as given, or a request cannot be served as asked.
  GQLA_STATUS_INVALID = 2,
  // The checkpoint or another file: missing, damaged or unsupported.
  GQLA_STATUS_FILE = 3,
  // The number of ranks does not fit the model and the path.
  GQLA_STATUS_SHARDING = 4,
  // Too little memory.
  GQLA_STATUS_MEMORY = 5,
  // A rank was lost, or the engine has stopped.
  GQLA_STATUS_STOPPED = 6,
  // The device, its driver or one of its libraries.
  GQLA_STATUS_DEVICE = 7,
  // The queue is full: try again later.
  GQLA_STATUS_FULL = 20,
  // The engine is finishing and takes nothing new.
  GQLA_STATUS_DRAINING = 21,
  // Nothing has come within the time given.
  GQLA_STATUS_TIMEOUT = 22,
  // The stream has ended: its last event has been given.
  GQLA_STATUS_END = 23,
  // The buffer given is too small; the length needed has been written.
  GQLA_STATUS_TOO_SMALL = 24,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum GqlaStatus GqlaStatus;
#else
typedef int32_t GqlaStatus;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What an event is.
enum GqlaEventKind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // A token.
  GQLA_EVENT_KIND_TOKEN = 0,
  // The last event: a stop token or the model's end of sequence.
  GQLA_EVENT_KIND_STOP = 1,
  // The last event: `max_tokens`.
  GQLA_EVENT_KIND_LENGTH = 2,
  // The last event: the engine failed; `gqla_last_error` says why.
  GQLA_EVENT_KIND_FAILED = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum GqlaEventKind GqlaEventKind;
#else
typedef int32_t GqlaEventKind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// A running engine.
typedef struct GqlaEngine GqlaEngine;

// The events of one request.
typedef struct GqlaStream GqlaStream;

// How to start an engine. `gqla_options_default` fills it.
typedef struct GqlaOptions {
  // Ranks, as threads of this process.
  uint32_t ranks;
  // The decoding path.
  int32_t path;
  // Sequences in a step at most.
  uint32_t max_sequences;
  // Requests that wait beside those.
  uint32_t max_waiting;
  // Tokens a step computes at most.
  uint32_t step_tokens;
  // Tokens the cache holds; 0 takes what memory allows.
  uint64_t cache_tokens;
  // Threads of a rank; 0 shares the host's cores.
  uint32_t threads;
} GqlaOptions;

// How to continue a prompt. `gqla_sampling_default` fills it.
typedef struct GqlaSampling {
  // Tokens to generate at most.
  uint32_t max_tokens;
  // 0 always takes the most probable token.
  float temperature;
  // Draw among the most probable tokens that sum to this.
  float top_p;
  // Draw among this many of the most probable; 0 is all.
  uint32_t top_k;
  // The same seed and prompt give the same tokens; used when `has_seed` is not 0.
  uint64_t seed;
  // Whether `seed` is given.
  uint8_t has_seed;
  // Not 0: go on past the model's end of sequence.
  uint8_t ignore_eos;
  // Not 0: report each token's log-probability.
  uint8_t logprobs;
} GqlaSampling;

// An event of a stream.
typedef struct GqlaEvent {
  // What it is.
  GqlaEventKind kind;
  // The token.
  uint32_t token;
  // Its log-probability, when asked for.
  float logprob;
  // In a last event: tokens of the prompt.
  uint64_t prompt_tokens;
  // In a last event: those of them found in the cache.
  uint64_t cached_tokens;
  // In a last event: tokens generated.
  uint64_t tokens;
} GqlaEvent;

// The engine's counts.
typedef struct GqlaStats {
  // Sequences in steps.
  uint64_t running;
  // Sequences waiting.
  uint64_t waiting;
  // Cache blocks free.
  uint64_t free_blocks;
  // Cache blocks in all.
  uint64_t total_blocks;
  // Steps computed.
  uint64_t steps;
  // Tokens generated.
  uint64_t generated_tokens;
  // Requests ended well.
  uint64_t finished;
  // Requests failed.
  uint64_t failed;
  // Requests cancelled.
  uint64_t cancelled;
} GqlaStats;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The library's version, as "1.2.3".
const char *gqla_version(void);

// What the last failed call on this thread has to say; valid until the thread's next failed call.
const char *gqla_last_error(void);

// Fills `options` with the defaults: one rank.
//
// # Safety
// `options` is NULL or points to a `GqlaOptions`.
GqlaStatus gqla_options_default(struct GqlaOptions *options);

// Fills `sampling` with the defaults: 16 tokens, greedy.
//
// # Safety
// `sampling` is NULL or points to a `GqlaSampling`.
GqlaStatus gqla_sampling_default(struct GqlaSampling *sampling);

// Loads the checkpoint in the directory `model` and starts an engine. `options` may be NULL for the defaults. The
// engine is freed by `gqla_free`.
//
// # Safety
// `model` is a text that ends in 0; `options` is NULL or points to options; `engine` points to where the handle goes.
GqlaStatus gqla_start(const char *model, const struct GqlaOptions *options, struct GqlaEngine **engine);

// Queues a prompt of `length` token ids. `sampling` may be NULL for the defaults. The stream is freed by
// `gqla_stream_free`. `GQLA_STATUS_FULL`: try again later.
//
// # Safety
// `engine` is a live engine; `prompt` points to `length` ids; `sampling` is NULL or points to one; `stream` points to
// where the handle goes.
GqlaStatus gqla_submit(const struct GqlaEngine *engine,
                       const uint32_t *prompt,
                       size_t length,
                       const struct GqlaSampling *sampling,
                       struct GqlaStream **stream);

// The stream's next event, waiting at most `milliseconds` for it: `GQLA_STATUS_TIMEOUT` when none has come,
// `GQLA_STATUS_END` after the last one and after `gqla_cancel`.
//
// # Safety
// `stream` is a live stream that no other call uses; `event` points to where the event goes.
GqlaStatus gqla_poll(struct GqlaStream *stream, uint64_t milliseconds, struct GqlaEvent *event);

// Cancels a stream: its blocks are free again, and it gives no more events. Twice is fine, NULL too.
//
// # Safety
// `stream` is NULL or a live stream that no other call uses.
GqlaStatus gqla_cancel(struct GqlaStream *stream);

// Frees a stream, cancelling it if it has not ended. NULL is fine.
//
// # Safety
// `stream` is NULL or a live stream, and is not used again.
void gqla_stream_free(struct GqlaStream *stream);

// The token ids of a text, into `ids`. `*length` is the room there, and becomes the number of ids;
// `GQLA_STATUS_TOO_SMALL` when there are more than there is room for.
//
// # Safety
// `engine` is a live engine; `input` is a text that ends in 0; `ids` points to `*length` ids, or is NULL where that
// is 0; `length` points to a number.
GqlaStatus gqla_encode(const struct GqlaEngine *engine, const char *input, uint32_t *ids, size_t *length);

// The text of `count` token ids, as UTF-8 without a final 0, into `output`. `*length` is the room there, and becomes
// the number of bytes; `GQLA_STATUS_TOO_SMALL` when there are more than there is room for.
//
// # Safety
// `engine` is a live engine; `ids` points to `count` ids; `output` points to `*length` bytes, or is NULL where that
// is 0; `length` points to a number.
GqlaStatus gqla_decode(const struct GqlaEngine *engine,
                       const uint32_t *ids,
                       size_t count,
                       char *output,
                       size_t *length);

// The engine's counts.
//
// # Safety
// `engine` is a live engine; `stats` points to where the counts go.
GqlaStatus gqla_stats(const struct GqlaEngine *engine, struct GqlaStats *stats);

// Takes nothing new, finishes what runs for at most `milliseconds`, then stops. Twice is fine.
//
// # Safety
// `engine` is a live engine.
GqlaStatus gqla_drain(const struct GqlaEngine *engine, uint64_t milliseconds);

// Stops at once; streams that run fail. Twice is fine.
//
// # Safety
// `engine` is a live engine.
GqlaStatus gqla_shutdown(const struct GqlaEngine *engine);

// Stops and frees an engine. Its streams may be freed before or after. NULL is fine.
//
// # Safety
// `engine` is NULL or a live engine that no other call uses, and is not used again.
void gqla_free(struct GqlaEngine *engine);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* GQLA_H */
