package org.messtf.example

import android.content.Context
import com.google.ai.edge.litert.Environment

/** LiteRT as it lies in the app. */
object Environments {
    const val HAS_GPU = true

    @Suppress("UNUSED_PARAMETER") // which the other flavour needs
    fun open(context: Context, ready: (Environment) -> Unit, failed: (Exception) -> Unit) {
        try {
            ready(Environment.create())
        } catch (error: Exception) {
            failed(error)
        }
    }
}
