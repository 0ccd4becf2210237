//! The loop of every rank but 0: wait for a message, do what it says.

use std::time::Duration;

use crate::engine::message::Message;
use crate::engine::runner::Run;
use crate::error::{Error, Result};

/// Serves until the coordinator says that it is over. The coordinator speaks at least every half second, so a silence
/// of `patience` is a lost coordinator.
pub fn serve(runner: &mut dyn Run, patience: Duration) -> Result<()> {
    let mut message = vec![];
    let mut number = 0u32;
    loop {
        runner.comm().broadcast(&mut message, Some(patience))?;
        match Message::decode(&message)? {
            Message::Shutdown => return Ok(()),
            Message::Heartbeat => runner.comm().barrier()?,
            Message::Step(step) => {
                number = number.wrapping_add(1);
                if step.number != number {
                    let rank = runner.comm().rank();
                    let what = format!("expected step {number} and got step {}", step.number);
                    return Err(Error::Rank { rank, what });
                }
                runner.launch(&step)?;
                runner.settle()?;
            }
        }
    }
}
