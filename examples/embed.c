/* Embedding the engine in C: a prompt, its continuation token by token, a cancelled stream, the engine's counts.
 *
 * cargo build --release
 * cc examples/embed.c -Iinclude -Ltarget/release -lgqla -Wl,-rpath,target/release -o embed
 * ./embed checkpoints/tiny-glm-gqla "def fibonacci(n):"
 */
#include <stdio.h>
#include <stdlib.h>

#include "gqla.h"

static void check(enum GqlaStatus status, const char *what) {
    if (status != GQLA_STATUS_OK) {
        fprintf(stderr, "%s: %s (%d)\n", what, gqla_last_error(), (int)status);
        exit(1);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: embed CHECKPOINT PROMPT\n");
        return 2;
    }
    struct GqlaOptions options;
    check(gqla_options_default(&options), "options");
    options.ranks = 2;
    options.threads = 1;
    options.cache_tokens = 4096;
    struct GqlaEngine *engine;
    check(gqla_start(argv[1], &options, &engine), "start");

    uint32_t prompt[1024];
    size_t length = sizeof prompt / sizeof *prompt;
    check(gqla_encode(engine, argv[2], prompt, &length), "encode");

    struct GqlaSampling sampling;
    check(gqla_sampling_default(&sampling), "sampling");
    sampling.max_tokens = 24;
    struct GqlaStream *stream;
    check(gqla_submit(engine, prompt, length, &sampling, &stream), "submit");
    for (;;) {
        struct GqlaEvent event;
        enum GqlaStatus status = gqla_poll(stream, 1000, &event);
        if (status == GQLA_STATUS_TIMEOUT)
            continue;
        check(status, "poll");
        if (event.kind == GQLA_EVENT_KIND_TOKEN) {
            /* A token alone may be half a character; a real program decodes all of them so far. */
            char text[256];
            size_t bytes = sizeof text;
            check(gqla_decode(engine, &event.token, 1, text, &bytes), "decode");
            fwrite(text, 1, bytes, stdout);
            continue;
        }
        if (event.kind == GQLA_EVENT_KIND_FAILED)
            check(GQLA_STATUS_STOPPED, "stream");
        printf("\n[%s, %llu tokens]\n", event.kind == GQLA_EVENT_KIND_STOP ? "stop" : "length",
               (unsigned long long)event.tokens);
        if (gqla_poll(stream, 0, &event) != GQLA_STATUS_END)
            return 3;
        break;
    }
    gqla_stream_free(stream);

    /* A stream that is cancelled gives its memory back. */
    sampling.max_tokens = 2000;
    check(gqla_submit(engine, prompt, length, &sampling, &stream), "submit");
    check(gqla_cancel(stream), "cancel");
    gqla_stream_free(stream);

    check(gqla_drain(engine, 10000), "drain");
    check(gqla_shutdown(engine), "shutdown");
    struct GqlaStats stats;
    check(gqla_stats(engine, &stats), "stats");
    printf("gqla %s: %llu finished, %llu of %llu blocks free\n", gqla_version(), (unsigned long long)stats.finished,
           (unsigned long long)stats.free_blocks, (unsigned long long)stats.total_blocks);
    if (gqla_submit(engine, prompt, length, &sampling, &stream) == GQLA_STATUS_OK)
        return 4;
    fprintf(stderr, "after the end: %s\n", gqla_last_error());
    gqla_free(engine);
    return 0;
}
