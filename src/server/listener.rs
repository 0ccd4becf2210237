//! Serving a router until told to stop, with connections that end when their reader does not read.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Sleep, sleep};

/// Serves `router` until `stop`; then open connections have `patience` to take what is on its way to them. A reader
/// that takes nothing for `slow` is disconnected.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    slow: Duration,
    patience: Duration,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (stopping, stopped) = tokio::sync::oneshot::channel();
    let stop = async move {
        stop.await;
        let _ = stopping.send(());
    };
    let served = axum::serve(Bounded { listener, slow }, router).with_graceful_shutdown(stop).into_future();
    tokio::select! {
        result = served => result,
        () = async {
            if stopped.await.is_err() {
                // It ended without being told: the other arm has its reason.
                std::future::pending::<()>().await;
            }
            sleep(patience).await;
        } => Ok(()),
    }
}

struct Bounded {
    listener: TcpListener,
    slow: Duration,
}

impl axum::serve::Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    // Tokens are small and should leave at once; where it cannot be set they leave a little later.
                    let _ = stream.set_nodelay(true);
                    return (Connection { stream, slow: self.slow, waits: None }, address);
                }
                // Too many open files, or a client that has gone: the next may do better.
                Err(e) => {
                    tracing::warn!("a connection was not accepted: {e}");
                    sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection whose writes fail when the other side reads nothing for too long.
struct Connection {
    stream: TcpStream,
    slow: Duration,
    /// Runs while a write waits.
    waits: Option<Pin<Box<Sleep>>>,
}

impl Connection {
    fn bound<T>(&mut self, done: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            self.waits = None;
            return done;
        }
        let slow = self.slow;
        let waits = self.waits.get_or_insert_with(|| Box::pin(sleep(slow)));
        match waits.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the reader does not read"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, c: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(c, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, c: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(c, bytes);
        self.bound(done, c)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        c: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(c, bytes);
        self.bound(done, c)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, c: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(c)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, c: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(c)
    }
}
